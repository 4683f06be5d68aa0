//! A cluster as Pacemaker describes it: what crm_mon says of its state, and cibadmin of its configuration.

use std::collections::BTreeMap;

use api::text::clean;
use roxmltree::{Document, Node, ParsingOptions};
use serde::Serialize;

/// What VMs and hosts count by, in MiB: a utilization attribute (Pacemaker Explained, "Utilization and Placement
/// Strategy").
pub const MEMORY: &str = "ballast_memory";
/// How pressed a host is, 0 to 100: a transient node attribute.
pub const PRESSURE: &str = "ballast_pressure";
/// The floors of the VMs that a host's balancer knows, in MiB: a transient node attribute.
pub const FLOORS: &str = "ballast_floors";
/// The agent whose resources are VMs in any case.
const VM_AGENT: &str = "ocf:ballast:vm";
/// The agent that publishes what a host has.
const NODE_AGENT: &str = "ocf:ballast:node";

/// The most elements of one answer: some tens of thousands of VMs.
const MOST_ELEMENTS: u32 = 2_000_000;

/// Why an answer of Pacemaker is not used.
#[derive(Debug, thiserror::Error)]
pub enum NotUnderstood {
    /// It is not XML.
    #[error("that is not XML ({0})")]
    Xml(String),
    /// It is XML of something else.
    #[error("it has no <{0}>; ballast knows Pacemaker 2.1")]
    Lacks(&'static str),
}

/// The whole cluster.
#[derive(Debug, Default)]
pub struct Cluster {
    /// The host that decides, if one was elected.
    pub controller: Option<String>,
    /// Whether this part of the cluster may act.
    pub has_quorum: bool,
    /// Whether lost hosts are switched off before their VMs start elsewhere.
    pub fences: bool,
    /// Nothing is started or stopped anywhere.
    pub is_in_maintenance: bool,
    /// `placement-strategy` counts utilization.
    pub counts_floors: bool,
    /// Above which pressure a location rule keeps newcomers away, if one does.
    pub pressure_limit: Option<u64>,
    /// By name, in Pacemaker's order.
    pub hosts: Vec<Host>,
    /// In Pacemaker's order.
    pub vms: Vec<Vm>,
    /// Resources by id with the hosts that they are active on, and what each counts.
    others: BTreeMap<String, Resource>,
}

/// How Pacemaker counts a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// It may run anything.
    Online,
    /// It was told to run nothing.
    Standby,
    /// What it runs is left as it is.
    Maintenance,
    /// It joins.
    Pending,
    /// It is gone, and was seen to be.
    Offline,
    /// It is gone or fails, and has to be fenced before its VMs start elsewhere.
    Unclean,
}

/// One host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// How it stands.
    pub state: HostState,
    /// What floors it may hold, in MiB; absent if it never told.
    pub capacity: Option<u64>,
    /// Absent if its agent does not run.
    pub pressure: Option<u64>,
    /// What its balancer counts, in MiB.
    pub floors: Option<u64>,
    /// The agent that tells these runs there.
    pub publishes: bool,
}

/// How a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// On one host.
    Running,
    /// An operation of it is under way.
    Moving,
    /// On no host, and it should be on one.
    Waiting,
    /// On no host, as it was told.
    Stopped,
    /// Its last operation failed.
    Failed,
    /// Pacemaker may do nothing with it.
    Blocked,
    /// On more than one host.
    Twice,
}

/// One VM.
#[derive(Clone, Debug)]
pub struct Vm {
    /// The resource's id.
    pub name: String,
    /// How it stands.
    pub state: VmState,
    /// Where it is active.
    pub hosts: Vec<String>,
    /// What it counts, in MiB; absent if it counts nothing.
    pub floor: Option<u64>,
    /// Hosts on which it could not be started, or stopped, or was lost, with what its agent said last.
    pub failures: Vec<(String, String)>,
    /// Hosts that a constraint of the administrator keeps it from.
    pub banned: Vec<String>,
}

#[derive(Debug, Default)]
struct Resource {
    agent: String,
    hosts: Vec<String>,
    counts: Option<u64>,
    is_stopped: bool,
    is_failed: bool,
    is_blocked: bool,
    is_pending: bool,
}

impl Cluster {
    /// What `crm_mon --output-as=xml` says.
    ///
    /// # Errors
    /// That is not what it wrote.
    pub fn of_status(xml: &str) -> Result<Self, NotUnderstood> {
        let document = parse(xml)?;
        let root = document.root_element();
        let summary = child(root, "summary").ok_or(NotUnderstood::Lacks("summary"))?;
        let nodes = child(root, "nodes").ok_or(NotUnderstood::Lacks("nodes"))?;
        let mut cluster = Self::default();
        if let Some(controller) = child(summary, "current_dc") {
            cluster.controller = text(controller, "name");
            cluster.has_quorum = is(controller, "with_quorum");
        }
        if let Some(options) = child(summary, "cluster_options") {
            cluster.fences = is(options, "stonith-enabled");
            cluster.is_in_maintenance = is(options, "maintenance-mode");
        }
        cluster.hosts = nodes.children().filter(|node| node.has_tag_name("node")).filter_map(host).collect();
        if let Some(resources) = child(root, "resources") {
            cluster.read_resources(resources);
        }
        if let Some(failures) = child(root, "failures") {
            cluster.read_failures(failures);
        }
        if let Some(attributes) = child(root, "node_attributes") {
            for node in attributes.children().filter(|node| node.has_tag_name("node")) {
                let name = text(node, "name");
                let host = cluster.hosts.iter_mut().find(|host| Some(&host.name) == name.as_ref());
                let Some(host) = host else { continue };
                let value = |name: &str| {
                    let attribute =
                        node.children().find(|attribute| attribute.attribute("name") == Some(name));
                    attribute.and_then(|attribute| number(attribute, "value"))
                };
                host.pressure = value(PRESSURE).map(|pressure| pressure.min(100));
                host.floors = value(FLOORS);
            }
        }
        Ok(cluster)
    }

    fn read_resources(&mut self, resources: Node) {
        let mut order = Vec::new();
        for node in resources.descendants().filter(|node| node.has_tag_name("resource")) {
            let Some(id) = text(node, "id") else { continue };
            let resource = self.others.entry(id.clone()).or_insert_with(|| {
                order.push(id.clone());
                Resource::default()
            });
            resource.agent = text(node, "resource_agent").unwrap_or_default();
            resource.is_failed |= is(node, "failed") && !is(node, "failure_ignored");
            resource.is_blocked |= is(node, "blocked") || node.attribute("managed") == Some("false");
            // An operation that is under way shows as a role of its own, and counts as if it were done.
            resource.is_pending |=
                matches!(node.attribute("role"), Some("Starting" | "Stopping" | "Migrating"));
            resource.is_stopped |= node.attribute("target_role") == Some("Stopped");
            let hosts = node.children().filter(|host| host.has_tag_name("node"));
            resource.hosts.extend(hosts.filter_map(|host| text(host, "name")));
        }
        for host in &mut self.hosts {
            host.publishes = self
                .others
                .values()
                .any(|other| other.agent == NODE_AGENT && other.hosts.contains(&host.name));
        }
        self.vms = order.into_iter().map(Vm::named).collect();
    }

    fn read_failures(&mut self, failures: Node) {
        for failure in failures.children().filter(|node| node.has_tag_name("failure")) {
            // Its key is RESOURCE_OPERATION_INTERVAL, and a resource's id may have `_` itself.
            let key = failure.attribute("op_key").unwrap_or_default();
            let id = key.rsplitn(3, '_').nth(2).unwrap_or_default();
            let Some(vm) = self.vms.iter_mut().find(|vm| vm.name == id) else { continue };
            let Some(host) = text(failure, "node") else { continue };
            let reason = text(failure, "exitreason").or_else(|| text(failure, "exitstatus"));
            // Pacemaker escapes it twice.
            let reason = reason
                .unwrap_or_else(|| "no reason given".into())
                .replace("&apos;", "'")
                .replace("&quot;", "\"");
            let task = text(failure, "task").unwrap_or_else(|| "operation".into());
            vm.failures.retain(|(other, _)| *other != host);
            vm.failures.push((host, format!("{task} failed: {reason}")));
        }
    }

    /// What `cibadmin --query --scope=configuration` says, of the cluster whose state is known.
    ///
    /// # Errors
    /// That is not what it wrote.
    pub fn add_configuration(&mut self, xml: &str) -> Result<(), NotUnderstood> {
        let document = parse(xml)?;
        let of_name = |name| document.descendants().filter(move |node: &Node| node.has_tag_name(name));
        let configuration = of_name("configuration").next().ok_or(NotUnderstood::Lacks("configuration"))?;
        if let Some(options) = child(configuration, "crm_config") {
            // Of several sets the first is used that has it; all of ours are in one.
            let strategy = pair(options, "placement-strategy");
            self.counts_floors = strategy.is_some_and(|strategy| strategy != "default");
        }
        for node in of_name("node") {
            let Some(host) = self.hosts.iter_mut().find(|host| node.attribute("uname") == Some(&*host.name))
            else {
                continue;
            };
            host.capacity = child(node, "utilization").and_then(memory);
        }
        let templates: BTreeMap<_, _> =
            of_name("template").filter_map(|node| Some((node.attribute("id")?, node))).collect();
        for node in of_name("primitive") {
            let Some(resource) = node.attribute("id").and_then(|id| self.others.get_mut(id)) else {
                continue;
            };
            let template = node.attribute("template").and_then(|id| templates.get(id)).copied();
            let own = [Some(node), template].into_iter().flatten();
            resource.counts = own.filter_map(|node| child(node, "utilization")).find_map(memory);
            let meta = child(node, "meta_attributes").and_then(|meta| pair(meta, "target-role"));
            resource.is_stopped |= meta == Some("Stopped");
        }
        self.pressure_limit = of_name("expression")
            .filter(|node| node.attribute("attribute") == Some(PRESSURE))
            .filter(|node| matches!(node.attribute("operation"), Some("gt" | "gte")))
            .find_map(|node| number(node, "value"));
        let bans: Vec<_> = of_name("rsc_location")
            .filter(|node| node.attribute("score") == Some("-INFINITY"))
            .filter_map(|node| Some((node.attribute("rsc")?, text(node, "node")?)))
            .collect();
        self.vms.retain(|vm| {
            let resource = self.others.get(&vm.name);
            resource.is_some_and(|resource| resource.agent == VM_AGENT || resource.counts.is_some())
        });
        for vm in &mut self.vms {
            let of_vm = bans.iter().filter(|(resource, _)| *resource == vm.name);
            vm.banned = of_vm.map(|(_, host)| host.clone()).collect();
            if let Some(resource) = self.others.get(&vm.name) {
                vm.fill(resource);
            }
        }
        Ok(())
    }

    /// What all that Pacemaker has placed on a host counts, in MiB.
    pub fn placed(&self, host: &str) -> u64 {
        let there = self.others.values().filter(|resource| resource.hosts.iter().any(|name| name == host));
        there.filter_map(|resource| resource.counts).fold(0, u64::saturating_add)
    }
}

impl Vm {
    fn named(name: String) -> Self {
        Self {
            name,
            state: VmState::Waiting,
            hosts: Vec::new(),
            floor: None,
            failures: Vec::new(),
            banned: Vec::new(),
        }
    }

    fn fill(&mut self, resource: &Resource) {
        self.floor = resource.counts;
        self.hosts.clone_from(&resource.hosts);
        self.state = match resource.hosts.len() {
            _ if resource.is_blocked => VmState::Blocked,
            _ if resource.is_failed => VmState::Failed,
            _ if resource.is_pending => VmState::Moving,
            0 if resource.is_stopped => VmState::Stopped,
            0 => VmState::Waiting,
            1 => VmState::Running,
            _ => VmState::Twice,
        };
    }
}

/// What a program of Pacemaker complained of in its answer, where that is XML: its last word on it.
pub fn complaint(xml: &str) -> Option<String> {
    let document = parse(xml).ok()?;
    let error = document.descendants().rfind(|node| node.has_tag_name("error"))?;
    error.text().map(clean)
}

fn host(node: Node) -> Option<Host> {
    let state = if is(node, "unclean") {
        HostState::Unclean
    } else if !is(node, "online") {
        HostState::Offline
    } else if is(node, "pending") {
        HostState::Pending
    } else if is(node, "maintenance") {
        HostState::Maintenance
    } else if is(node, "standby") || is(node, "standby_onfail") {
        HostState::Standby
    } else {
        HostState::Online
    };
    let name = text(node, "name")?;
    Some(Host { name, state, capacity: None, pressure: None, floors: None, publishes: false })
}

fn parse(xml: &str) -> Result<Document<'_>, NotUnderstood> {
    // Without a DTD, so without entities of its own.
    let options = ParsingOptions { nodes_limit: MOST_ELEMENTS, ..ParsingOptions::default() };
    Document::parse_with_options(xml, options).map_err(|error| NotUnderstood::Xml(clean(&error.to_string())))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn is(node: Node, name: &str) -> bool {
    node.attribute(name) == Some("true")
}

/// A name that somebody else chose, fit to be shown.
fn text(node: Node, name: &str) -> Option<String> {
    node.attribute(name).map(clean).filter(|text| !text.is_empty())
}

fn number(node: Node, name: &str) -> Option<u64> {
    node.attribute(name)?.trim().parse().ok()
}

/// The value of a name-value pair below `node`.
fn pair<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    let mut pairs = node.descendants().filter(|pair| pair.has_tag_name("nvpair"));
    pairs.find(|pair| pair.attribute("name") == Some(name)).and_then(|pair| pair.attribute("value"))
}

fn memory(utilization: Node) -> Option<u64> {
    pair(utilization, MEMORY)?.trim().parse().ok()
}

#[cfg(test)]
mod tests;
