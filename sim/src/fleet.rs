//! A cluster of many hosts over a day: what it gains that VMs are counted by their floors, and hosts by their pressure.
//!
//! [`placement`] is a model of how Pacemaker places, [`day`] runs a day of demand and losses over it. What hosts tell
//! is [`balancer::fleet`] itself. Each minute is a step, within which the cluster does all that it wants to.

pub mod day;
pub mod placement;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::words::words;

/// By what the cluster counts VMs and hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Counting {
    /// A VM by its `max`, a host by its budget: nobody is ever short.
    Sizes,
    /// A VM by its floor, a host by its budget, whatever VMs demand.
    Floors,
    /// A VM by its floor, a host by what its balancer tells: capacity and pressure.
    Pressure,
}

words! {
    Counting, UnknownCounting: "`{}` is no way to count: use one of {}",
    Sizes "sizes",
    Floors "floors",
    Pressure "pressure",
}

/// The cluster that is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// How many hosts.
    pub hosts: usize,
    /// How many VMs want to run, all of them after a quarter of the time.
    pub vms: usize,
    /// What each host has for VMs.
    pub budget: Bytes,
    /// How long.
    pub minutes: usize,
    /// How many hosts are lost in that time; each comes back after two hours.
    pub losses: usize,
    /// Demand and losses belong to it.
    pub seed: u64,
}
