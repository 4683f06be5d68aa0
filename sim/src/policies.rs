//! Memory policies, ours and others, behind one interface.
//!
//! The others are written from what their makers and sources say they do. Each file names its source and what
//! had to be guessed. None is handicapped knowingly: all have the same reports, limits, budget and balloon.
//! If a system's hypervisor refuses memory that is not there (Xen, ESXi, Hyper-V), so does the simulated one.

pub(crate) mod ballast;
mod esxi;
mod fixed;
mod hyperv;
mod mom;
mod proxmox;
mod selfballoon;
mod squeezed;

use std::time::Duration;

use api::limits::Limits;
use api::units::Bytes;
use serde::Serialize;

use super::guest::Report;
use super::words::words;
use balancer::policy::guards;

/// What a policy sees of one VM.
#[derive(Clone, Debug)]
pub struct VmInput {
    /// Which VM.
    pub id: usize,
    /// Its limits.
    pub limits: Limits,
    /// Its target.
    pub target: Bytes,
    /// What its balloon leaves it, as far as its kernel manages that.
    pub actual: Bytes,
    /// What it was given beside that.
    pub unmanaged: Bytes,
    /// The most that its guest can have.
    pub most: Bytes,
    /// What its control group allows it, if it has a limit.
    pub allowed: Option<Bytes>,
    /// What the host holds for it.
    pub resident: Bytes,
    /// Nobody can tell what the host holds for it.
    pub hidden: bool,
    /// Whether its balloon driver runs.
    pub driver: bool,
    /// Whether its API answers.
    pub answers: bool,
    /// How long it has run.
    pub uptime: Duration,
    /// Its last report.
    pub report: Option<Report>,
}

impl VmInput {
    /// What it may hold. A VM that starts has not touched what its balloon is to take.
    pub fn held(&self) -> Bytes {
        let starts = !self.driver && self.uptime < guards::BOOT;
        let may = if starts { self.target } else { self.actual };
        may.max(self.resident).min(self.limits.max())
    }
}

/// What a policy sees of the host.
#[derive(Clone, Copy, Debug)]
pub struct PolicyInput<'a> {
    /// Time since the run began.
    pub now: Duration,
    /// What all VMs together may hold.
    pub budget: Bytes,
    /// What VMs that wait for their start need.
    pub reserved: Bytes,
    /// The running VMs.
    pub vms: &'a [VmInput],
}

impl PolicyInput<'_> {
    /// What the VMs hold now.
    pub fn held(&self) -> Bytes {
        self.vms.iter().map(VmInput::held).sum()
    }
}

/// A memory policy.
pub trait MemoryPolicy {
    /// The time between two decisions.
    fn cadence(&self) -> Duration;

    /// Whether the system's hypervisor refuses memory that is not free.
    fn is_refused_what_is_not_there(&self) -> bool {
        false
    }

    /// Pushes new targets. They are clamped to the VM's limits.
    fn decide(&mut self, view: &PolicyInput, targets: &mut Vec<(usize, Bytes)>);
}

/// The policies there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// [`balancer::policy`].
    Ballast,
    /// Static sizes.
    Static,
    /// Like Hyper-V's Dynamic Memory.
    HyperV,
    /// Like ESXi's.
    Esxi,
    /// Xen's selfballooning.
    Selfballoon,
    /// oVirt's Memory Overcommitment Manager.
    Mom,
    /// Proxmox VE's automatic allocation.
    Proxmox,
    /// XenServer's squeezed.
    Squeezed,
}

impl PolicyName {
    /// Its name for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Ballast => "ballast",
            Self::Static => "static",
            Self::HyperV => "Hyper-V-like",
            Self::Esxi => "ESXi-like",
            Self::Selfballoon => "Xen selfballoon",
            Self::Mom => "oVirt MoM",
            Self::Proxmox => "Proxmox VE",
            Self::Squeezed => "Xen squeezed",
        }
    }

    /// The policy at its start.
    pub fn make(self) -> Box<dyn MemoryPolicy> {
        match self {
            Self::Ballast => Box::new(ballast::Ballast::default()),
            Self::Static => Box::new(fixed::Static::default()),
            Self::HyperV => Box::new(hyperv::HyperV::default()),
            Self::Esxi => Box::new(esxi::Esxi::default()),
            Self::Selfballoon => Box::new(selfballoon::Selfballoon),
            Self::Mom => Box::new(mom::Mom::default()),
            Self::Proxmox => Box::new(proxmox::Proxmox),
            Self::Squeezed => Box::new(squeezed::Squeezed::default()),
        }
    }
}

words! {
    PolicyName, UnknownPolicy: "`{}` is no policy: use one of {}",
    Ballast "ballast",
    HyperV "hyper-v",
    Esxi "esxi",
    Selfballoon "selfballoon",
    Mom "mom",
    Proxmox "proxmox",
    Squeezed "squeezed",
    Static "static",
}

/// Divides `capacity` among claims (what it keeps, what it wants at most, its share): each gets the smaller
/// of what it wants and its share of what is left.
fn fill(capacity: Bytes, claims: &[(Bytes, Bytes, u64)]) -> Vec<Bytes> {
    let mut given: Vec<Bytes> = claims.iter().map(|&(floor, _, _)| floor).collect();
    let mut left = capacity.saturating_sub(given.iter().copied().sum());
    let mut open: Vec<usize> =
        (0..claims.len()).filter(|&i| claims[i].1 > claims[i].0 && claims[i].2 > 0).collect();
    while !open.is_empty() {
        let shares: u128 = open.iter().map(|&i| u128::from(claims[i].2)).sum();
        let part = |i: usize| Bytes((u128::from(left.0) * u128::from(claims[i].2) / shares) as u64);
        let missing = |i: usize| claims[i].1.saturating_sub(claims[i].0);
        let (full, rest): (Vec<usize>, Vec<usize>) = open.iter().partition(|&&i| missing(i) <= part(i));
        if full.is_empty() {
            for i in rest {
                given[i] += part(i);
            }
            break;
        }
        let taken: Bytes = full.iter().map(|&i| missing(i)).sum();
        for i in full {
            given[i] = claims[i].1;
        }
        left = left.saturating_sub(taken);
        open = rest;
    }
    given
}

#[cfg(test)]
mod tests;
