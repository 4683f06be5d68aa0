//! A Cloud Hypervisor VM: HTTP and JSON over its API socket.
//!
//! Written from its published API description (`vmm/src/api/openapi/cloud-hypervisor.yaml`). It tells the
//! guest's size, the balloon's target, what the guest has, and, in its newest versions, the guest's
//! statistics with the millisecond of their arrival. VMs of a version without them are never shrunk, and
//! charged for what they have.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use api::client::{DEFAULT_TIMEOUT, Http, Peer, PeerProcess};
use api::limits::Wanted;
use api::status::{AgedReport, DriverState};
use api::text::clean;
use api::units::Bytes;
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Error;
use super::foreign::{ForeignDriver, ForeignStatus, ForeignVm};
use super::statistics::{self, Names};

const INFO: &str = "/api/v1/vm.info";
const RESIZE: &str = "/api/v1/vm.resize";
const STATISTICS: &str = "/api/v1/vm.balloon-stats";

/// Cloud Hypervisor's names of the statistics.
const NAMES: Names = "\
    swap_in swap_out major_faults minor_faults free_memory total_memory available_memory disk_caches \
    hugetlb_allocations hugetlb_failures oom_kills alloc_stalls async_scans direct_scans \
    async_reclaims direct_reclaims";

/// `GET vm.info`, as far as it matters here.
#[derive(Deserialize)]
struct VmInfo {
    config: VmConfig,
    state: String,
    /// What the guest has: its memory less the balloon.
    memory_actual_size: Option<u64>,
}

#[derive(Deserialize)]
struct VmConfig {
    memory: Memory,
    balloon: Option<Balloon>,
}

#[derive(Deserialize)]
struct Memory {
    /// 0 if it consists of zones.
    size: u64,
    hotplug_size: Option<u64>,
    hotplugged_size: Option<u64>,
    #[serde(default)]
    zones: Option<Vec<Zone>>,
}

#[derive(Deserialize)]
struct Zone {
    size: u64,
    hotplugged_size: Option<u64>,
}

#[derive(Deserialize)]
struct Balloon {
    /// What the guest is asked to give up.
    size: u64,
}

/// `GET vm.balloon-stats`.
#[derive(Deserialize)]
struct BalloonStatistics {
    /// Milliseconds since 1970; 0 before the first ones.
    last_update: u64,
    stats: BTreeMap<String, Value>,
}

/// How the VM's size is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mechanism {
    /// By its balloon.
    Balloon,
    /// By memory that can be plugged and unplugged above `least`.
    Plug {
        /// What it booted with.
        least: Bytes,
    },
}

impl Memory {
    fn total(&self) -> Bytes {
        let own = Bytes(self.size).saturating_add(Bytes(self.hotplugged_size.unwrap_or(0)));
        let zones = self.zones.iter().flatten();
        zones.fold(own, |sum, zone| {
            sum.saturating_add(Bytes(zone.size)).saturating_add(Bytes(zone.hotplugged_size.unwrap_or(0)))
        })
    }
}

/// An error is a list of sentences, the outermost first; older versions send text.
fn sentence(body: &[u8]) -> Option<String> {
    match serde_json::from_slice::<Vec<String>>(body) {
        Ok(sentences) => Some(sentences.join(": ")),
        Err(_) => Some(clean(std::str::from_utf8(body).ok()?)).filter(|text| !text.trim().is_empty()),
    }
}

static PEER: Peer = Peer {
    version: None,
    sentence,
    where_to_look: "",
    should_be: "is it the API socket of a Cloud Hypervisor VM?",
};

/// The driver of one Cloud Hypervisor VM.
pub struct CloudHypervisor {
    http: Http,
    vm: ForeignVm,
    /// Whether this version has statistics; `None` until it was asked.
    tells_statistics: Option<bool>,
}

impl CloudHypervisor {
    /// The VM whose API listens at `socket`, with these limits; without any, its memory
    /// stays as it is. Connects at the first request.
    pub fn new(socket: impl Into<PathBuf>, limits: Option<Wanted>) -> Self {
        Self {
            http: Http::new(&PEER, socket.into(), DEFAULT_TIMEOUT),
            vm: ForeignVm::new(limits),
            tells_statistics: None,
        }
    }

    /// The same with another limit for each request.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.http.set_timeout(timeout);
        self
    }

    async fn report(&mut self) -> Result<Option<AgedReport>, Error> {
        if self.tells_statistics == Some(false) {
            return Ok(None);
        }
        let BalloonStatistics { last_update, stats } = match self.http.get(STATISTICS).await {
            Ok(statistics) => statistics,
            // This version has no statistics.
            Err(Error::Refused { status, .. }) if status == "404" => {
                self.tells_statistics = Some(false);
                return Ok(None);
            }
            // The guest's driver has not offered any yet.
            Err(Error::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        self.tells_statistics = Some(true);
        let report = statistics::read(NAMES, &stats)
            .map_err(|what| self.http.nonsense(format!("GET {STATISTICS}"), &what))?;
        if last_update == 0 {
            return Ok(None);
        }
        let age = self.vm.age.of_report_at(Duration::from_millis(last_update), last_update);
        Ok(Some(statistics::aged(age, report)))
    }
}

impl ForeignDriver for CloudHypervisor {
    fn process(&self) -> PeerProcess {
        self.http.process()
    }

    fn hang_up(&mut self) {
        self.http.hang_up();
    }

    fn vm(&mut self) -> &mut ForeignVm {
        &mut self.vm
    }

    async fn look(&mut self) -> Result<ForeignStatus, Error> {
        let info: VmInfo = self.http.get(INFO).await?;
        if self.vm.meet(self.http.process()) {
            self.tells_statistics = None;
        }
        let VmInfo { config, state, memory_actual_size } = &info;
        let (now, most) = (config.memory.total(), most(&config.memory));
        let mechanism = mechanism(config);
        let actual = memory_actual_size.map_or(now, |actual| Bytes(actual).min(now));
        let report = match mechanism {
            Some(Mechanism::Balloon) => self.report().await?,
            _ => None,
        };
        let target = match (mechanism, &config.balloon) {
            (Some(Mechanism::Balloon), Some(balloon)) => now.saturating_sub(Bytes(balloon.size)),
            _ => now,
        };
        let has = if mechanism == Some(Mechanism::Balloon) { now } else { most };
        let driver = match mechanism {
            None => DriverState::Absent,
            Some(_) if state != "Running" => DriverState::Silent,
            Some(_) => DriverState::Active,
        };
        Ok(ForeignStatus { has, target, actual, driver, report })
    }

    async fn ask_for(&mut self, target: Bytes) -> Result<(), Error> {
        let VmInfo { config, .. } = self.http.get(INFO).await?;
        let order = match mechanism(&config) {
            Some(Mechanism::Plug { least }) => json!({ "desired_ram": target.max(least).0 }),
            // A VM without a balloon refuses that itself.
            _ => json!({ "desired_balloon": config.memory.total().saturating_sub(target).0 }),
        };
        self.http.send(Method::PUT, RESIZE, &order).await
    }
}

/// What the VM can have at most.
fn most(memory: &Memory) -> Bytes {
    let plugged = memory.hotplugged_size.unwrap_or(0);
    let room = memory.hotplug_size.unwrap_or(0).saturating_sub(plugged);
    memory.total().saturating_add(Bytes(room))
}

fn mechanism(config: &VmConfig) -> Option<Mechanism> {
    if config.balloon.is_some() {
        return Some(Mechanism::Balloon);
    }
    let least = Bytes(config.memory.size);
    config.memory.hotplug_size.filter(|&room| room > 0).map(|_| Mechanism::Plug { least })
}
