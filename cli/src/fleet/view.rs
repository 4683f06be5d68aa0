//! What `ballast fleet` shows of a cluster.

use serde::Serialize;

use super::cluster::{Cluster, Host, HostState, Vm, VmState};
use crate::table;

/// Above which pressure the manual's rule keeps newcomers away, where the cluster has no rule of its own.
const USUAL_LIMIT: u64 = 80;

/// A cluster for people and for JSON. Amounts are in MiB.
#[derive(Debug, Serialize)]
pub struct View {
    /// The host that decides; null while none is elected.
    pub controller: Option<String>,
    /// Whether what is seen here is the part of the cluster that may act.
    pub quorum: bool,
    /// Whether lost hosts are switched off before their VMs start elsewhere.
    pub fencing: bool,
    /// The hosts.
    pub hosts: Vec<HostRow>,
    /// The VMs.
    pub vms: Vec<VmRow>,
    /// What the administrator should know.
    pub remarks: Vec<String>,
}

/// A host.
#[derive(Debug, Serialize)]
pub struct HostRow {
    name: String,
    state: HostState,
    /// Whether it may be given a VM that is not there yet, if that fits.
    takes_newcomers: bool,
    capacity_mib: Option<u64>,
    placed_mib: u64,
    free_mib: Option<u64>,
    pressure: Option<u64>,
    /// What its balancer counts.
    floors_mib: Option<u64>,
    vms: Vec<String>,
}

/// A VM.
#[derive(Debug, Serialize)]
pub struct VmRow {
    name: String,
    state: VmState,
    hosts: Vec<String>,
    floor_mib: Option<u64>,
    why: String,
}

impl View {
    /// Of the whole cluster.
    pub fn of(cluster: &Cluster) -> Self {
        let hosts: Vec<HostRow> = cluster.hosts.iter().map(|host| HostRow::of(cluster, host)).collect();
        let vms = cluster.vms.iter().map(|vm| VmRow::of(cluster, vm)).collect();
        Self {
            controller: cluster.controller.clone(),
            quorum: cluster.has_quorum,
            fencing: cluster.fences,
            remarks: remarks(cluster),
            hosts,
            vms,
        }
    }

    /// Two tables.
    pub fn render(&self) -> String {
        let head = ["HOST", "STATE", "NEWCOMERS", "CAPACITY", "PLACED", "FREE", "PRESSURE", "VMS"];
        let hosts: Vec<_> = self.hosts.iter().map(HostRow::cells).collect();
        let mut text = table::render(head, &hosts);
        text.push('\n');
        if self.vms.is_empty() {
            text.push_str("No VMs: `pcs resource create NAME ocf:ballast:vm name=NAME` adds one.\n");
            return text;
        }
        let vms: Vec<_> = self.vms.iter().map(VmRow::cells).collect();
        text.push_str(&table::render(["VM", "STATE", "HOST", "FLOOR", "WHY"], &vms));
        text
    }
}

impl HostRow {
    fn of(cluster: &Cluster, host: &Host) -> Self {
        let placed = cluster.placed(&host.name);
        let on_it = |vm: &&Vm| vm.hosts.contains(&host.name);
        Self {
            name: host.name.clone(),
            state: host.state,
            takes_newcomers: refuses(cluster, host).is_none(),
            capacity_mib: host.capacity,
            placed_mib: placed,
            free_mib: host.capacity.map(|capacity| capacity.saturating_sub(placed)),
            pressure: host.pressure,
            floors_mib: host.floors,
            vms: cluster.vms.iter().filter(on_it).map(|vm| vm.name.clone()).collect(),
        }
    }

    fn cells(&self) -> [String; 8] {
        [
            self.name.clone(),
            host_state(self.state).to_owned(),
            if self.takes_newcomers { "yes" } else { "no" }.to_owned(),
            amount(self.capacity_mib),
            amount(Some(self.placed_mib)),
            amount(self.free_mib),
            self.pressure.map_or_else(|| "-".to_owned(), |pressure| pressure.to_string()),
            self.vms.len().to_string(),
        ]
    }
}

impl VmRow {
    fn of(cluster: &Cluster, vm: &Vm) -> Self {
        Self {
            name: vm.name.clone(),
            state: vm.state,
            hosts: vm.hosts.clone(),
            floor_mib: vm.floor,
            why: why(cluster, vm),
        }
    }

    fn cells(&self) -> [String; 5] {
        let hosts = if self.hosts.is_empty() { "-".to_owned() } else { self.hosts.join(",") };
        [self.name.clone(), vm_state(self.state).to_owned(), hosts, amount(self.floor_mib), self.why.clone()]
    }
}

/// Why a host gets no VM that is not there yet, whatever its size.
fn refuses(cluster: &Cluster, host: &Host) -> Option<String> {
    if host.state != HostState::Online {
        return Some(format!("is {}", host_state(host.state)));
    }
    if cluster.counts_floors && host.capacity.is_none() {
        return Some("has told no capacity".into());
    }
    let limit = cluster.pressure_limit?;
    match host.pressure {
        None => Some("does not tell its pressure".into()),
        Some(pressure) if pressure > limit => Some(format!("is under pressure ({pressure})")),
        Some(_) => None,
    }
}

/// Why a host can't be given `vm`.
fn cannot_take(cluster: &Cluster, host: &Host, vm: &Vm) -> Option<String> {
    if vm.banned.contains(&host.name) {
        return Some("is banned by a constraint".into());
    }
    if let Some((_, reason)) = vm.failures.iter().find(|(failed, _)| *failed == host.name) {
        return Some(format!("({reason})"));
    }
    refuses(cluster, host).or_else(|| {
        let free = host.capacity?.saturating_sub(cluster.placed(&host.name));
        (cluster.counts_floors && free < vm.floor?).then(|| format!("has {free} MiB left"))
    })
}

fn why(cluster: &Cluster, vm: &Vm) -> String {
    let refusals = || {
        let refusals: Vec<_> = cluster
            .hosts
            .iter()
            .filter(|host| !vm.hosts.contains(&host.name))
            .map(|host| (host, cannot_take(cluster, host, vm)))
            .collect();
        let could: Vec<_> =
            refusals.iter().filter(|(_, why)| why.is_none()).map(|(host, _)| &*host.name).collect();
        let told: Vec<_> = refusals
            .iter()
            .filter_map(|(host, why)| Some(format!("{} {}", host.name, why.as_ref()?)))
            .collect();
        (could.join(", "), told.join("; "))
    };
    match vm.state {
        VmState::Stopped => "it was told to stop (target-role)".into(),
        VmState::Twice => "more than one host runs it: look at once whether both write to its disks".into(),
        VmState::Blocked => "the cluster may do nothing with it (unmanaged, or a stop failed)".into(),
        VmState::Failed => match vm.failures.last() {
            Some((host, reason)) => format!("its {reason} (on {host})"),
            None => "its last operation failed: `crm_mon -1r` says which".into(),
        },
        VmState::Moving => "an operation is under way".into(),
        VmState::Waiting if !cluster.has_quorum => {
            "this part of the cluster has no quorum: it starts nothing".into()
        }
        VmState::Waiting => match refusals() {
            (could, _) if !could.is_empty() => {
                format!("{could} may take it: it is about to start, or a constraint is in its way")
            }
            (_, told) => format!("no host may take it: {told}"),
        },
        VmState::Running => match (vm.floor, refusals()) {
            (None, _) => "it counts nothing: `ballast_memory` of it is not set".into(),
            (Some(_), (could, told)) if could.is_empty() => format!("it fits here, and nowhere else: {told}"),
            (Some(_), (could, _)) => format!("it fits here, and stays; {could} could take it"),
        },
    }
}

fn remarks(cluster: &Cluster) -> Vec<String> {
    let mut remarks = Vec::new();
    if cluster.controller.is_none() {
        remarks.push("the cluster has no controller yet: what is shown may change in a moment".into());
    }
    if cluster.controller.is_some() && !cluster.has_quorum {
        remarks.push("this part of the cluster has no quorum: what other hosts do is not known".into());
    }
    if cluster.is_in_maintenance {
        remarks.push("the cluster is in maintenance mode: nothing is started, moved or stopped".into());
    }
    if !cluster.fences {
        remarks.push("there is no fencing (stonith-enabled): a VM may run twice where a host is lost".into());
    }
    if !cluster.counts_floors {
        remarks.push("floors are not counted: `pcs property set placement-strategy=balanced`".into());
    }
    if cluster.pressure_limit.is_none() {
        remarks.push(format!(
            "no rule keeps newcomers from hosts under pressure (ballast_pressure gt {USUAL_LIMIT}): the manual has it"
        ));
    }
    for host in cluster.hosts.iter().filter(|host| host.state == HostState::Online && !host.publishes) {
        remarks.push(format!("{} tells nothing of itself: ocf:ballast:node does not run there", host.name));
    }
    for vm in cluster.vms.iter().filter(|vm| !vm.failures.is_empty()) {
        remarks.push(format!(
            "{0} has failed before: `pcs resource cleanup {0}` has its hosts tried again",
            vm.name
        ));
    }
    for vm in cluster.vms.iter().filter(|vm| vm.floor.is_none()) {
        remarks
            .push(format!("{0} counts nothing: `pcs resource utilization {0} ballast_memory=MIB`", vm.name));
    }
    remarks
}

fn amount(mib: Option<u64>) -> String {
    mib.map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB"))
}

const fn host_state(state: HostState) -> &'static str {
    match state {
        HostState::Online => "online",
        HostState::Standby => "standby",
        HostState::Maintenance => "maintenance",
        HostState::Pending => "joining",
        HostState::Offline => "offline",
        HostState::Unclean => "lost",
    }
}

const fn vm_state(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Moving => "moving",
        VmState::Waiting => "waiting",
        VmState::Stopped => "stopped",
        VmState::Failed => "failed",
        VmState::Blocked => "blocked",
        VmState::Twice => "twice",
    }
}
