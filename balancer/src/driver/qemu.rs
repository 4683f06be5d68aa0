//! A QEMU VM: QMP over its Unix socket.
//!
//! QEMU tells the guest's size, what its balloon leaves it, and the guest's statistics with the second of
//! their arrival. It does not tell its last target, so the driver keeps that.

mod qmp;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use api::client::{Acquaintance, DEFAULT_TIMEOUT, PeerProcess};
use api::limits::Wanted;
use api::status::{AgedReport, DriverState};
use api::units::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use self::qmp::{Event, Qmp};
use super::Error;
use super::foreign::{ForeignDriver, ForeignStatus, ForeignVm};
use super::statistics::{self, Names};

/// Where QEMU keeps devices with an id and without one.
const QOM_PATHS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// How often QEMU is to ask the guest for statistics. It takes no less than a second.
const POLLING_INTERVAL: Duration = Duration::from_secs(1);

/// QEMU's names of the statistics (`hw/virtio/virtio-balloon.c`; the last six since QEMU 9.1).
const NAMES: Names = "\
    stat-swap-in stat-swap-out stat-major-faults stat-minor-faults stat-free-memory \
    stat-total-memory stat-available-memory stat-disk-caches stat-htlb-pgalloc stat-htlb-pgfail \
    stat-oom-kills stat-alloc-stalls stat-async-scans stat-direct-scans stat-async-reclaims \
    stat-direct-reclaims";

/// `query-status`.
#[derive(Deserialize)]
struct RunState {
    running: bool,
}

/// `query-memory-size-summary`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MemorySize {
    base_memory: u64,
    #[serde(default)]
    plugged_memory: u64,
}

/// `query-balloon`.
#[derive(Deserialize)]
struct BalloonInfo {
    /// Signed, and below zero if a guest claims a balloon larger than its memory.
    actual: i64,
}

/// One of `qom-list`.
#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// The balloon's `guest-stats`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct GuestStatistics {
    stats: BTreeMap<String, Value>,
    /// Seconds since 1970; 0 if the guest never sent any.
    last_update: u64,
}

/// Found out once for each connection, and again when a device may have come or gone.
struct Machine {
    /// Whether there is a balloon that takes targets.
    balloon: bool,
    /// Where its statistics are read.
    statistics: Option<String>,
    running: bool,
}

struct Link {
    qmp: Qmp,
    machine: Option<Machine>,
}

/// The driver of one QEMU VM.
pub struct Qemu {
    name: String,
    socket: PathBuf,
    timeout: Duration,
    vm: ForeignVm,
    link: Option<Link>,
    /// Who is at the other end of the last connection.
    acquaintance: Option<Acquaintance>,
    /// The last target that this driver set.
    target: Option<Bytes>,
}

impl Qemu {
    /// The VM called `name`, whose QMP listens at `socket`, with these limits; without
    /// any, its memory stays as it is. Connects at the first request.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>, limits: Option<Wanted>) -> Self {
        Self {
            name: name.into(),
            socket: socket.into(),
            timeout: DEFAULT_TIMEOUT,
            vm: ForeignVm::new(limits),
            link: None,
            acquaintance: None,
            target: None,
        }
    }

    /// The same with another limit for each request.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    async fn link(&mut self) -> Result<Link, Error> {
        if let Some(link) = self.link.take() {
            return Ok(link);
        }
        let qmp = Qmp::connect(&self.socket, self.timeout).await?;
        self.acquaintance = Some(qmp.acquaintance().clone().after(self.acquaintance.as_ref()));
        Ok(Link { qmp, machine: None })
    }

    /// Keeps the connection, unless a part of an exchange is still in flight on it.
    fn keep<T>(&mut self, mut link: Link, outcome: Result<T, Error>) -> Result<T, Error> {
        if matches!(outcome, Err(Error::Refused { .. })) {
            // The balloon may have been unplugged, or another plugged in its place.
            link.machine = None;
        }
        if matches!(outcome, Ok(_) | Err(Error::Refused { .. } | Error::Busy { .. })) {
            self.link = Some(link);
        }
        outcome
    }

    async fn question(&mut self, link: &mut Link) -> Result<ForeignStatus, Error> {
        let Link { qmp, machine } = link;
        self.greet(qmp).await?;
        let size: MemorySize = qmp.execute("query-memory-size-summary", json!({})).await?;
        let has = Bytes(size.base_memory).saturating_add(Bytes(size.plugged_memory));
        let limits = self.vm.limits(has);
        let machine = match machine {
            // A balloon may have been plugged.
            Some(machine) if machine.balloon || !has_balloon(qmp).await? => machine,
            machine => {
                let found = introduce(qmp).await?;
                if found.balloon && limits.is_dynamic() {
                    // Its target was not known before: from now on it is.
                    let target = match self.target {
                        Some(target) => target,
                        None => actual(qmp, has).await?,
                    };
                    self.tell_connected(qmp, target).await?;
                }
                machine.insert(found)
            }
        };
        let actual = if machine.balloon { actual(qmp, has).await? } else { has };
        let report = match &machine.statistics {
            Some(path) => self.report(qmp, path).await?,
            None => None,
        };
        for event in qmp.events() {
            self.note(machine, event);
        }
        let driver = match machine {
            Machine { balloon: false, .. } => DriverState::Absent,
            Machine { running: false, .. } => DriverState::Silent,
            // Only statistics or a filled balloon tell that the guest has a driver.
            _ if report.is_some() || actual < has => DriverState::Active,
            _ => DriverState::Absent,
        };
        Ok(ForeignStatus { has, target: self.target.unwrap_or(actual), actual, driver, report })
    }

    async fn greet(&mut self, qmp: &mut Qmp) -> Result<(), Error> {
        qmp.greet().await?;
        // Who answers is known from its greeting on.
        if self.vm.meet(ForeignDriver::process(self)) {
            self.target = None;
        }
        Ok(())
    }

    async fn report(&mut self, qmp: &mut Qmp, path: &str) -> Result<Option<AgedReport>, Error> {
        let question = json!({ "path": path, "property": "guest-stats" });
        let GuestStatistics { stats, last_update } = qmp.execute("qom-get", question).await?;
        let report =
            statistics::read(NAMES, &stats).map_err(|what| qmp.nonsense("qom-get guest-stats", &what))?;
        if last_update == 0 {
            return Ok(None);
        }
        let age = self.vm.age.of_report_at(Duration::from_secs(last_update), last_update);
        Ok(Some(statistics::aged(age, report)))
    }

    async fn tell(&mut self, link: &mut Link, target: Bytes) -> Result<(), Error> {
        self.greet(&mut link.qmp).await?;
        self.tell_connected(&mut link.qmp, target).await
    }

    async fn tell_connected(&mut self, qmp: &mut Qmp, target: Bytes) -> Result<(), Error> {
        qmp.execute::<Value>("balloon", json!({ "value": target.0 })).await?;
        self.target = Some(target);
        Ok(())
    }

    fn note(&self, machine: &mut Machine, event: Event) {
        let name = &self.name;
        match event {
            Event::Stop if std::mem::replace(&mut machine.running, false) => {
                info!(vm = name, "{name} was paused: it keeps what it has");
            }
            Event::Resume if !std::mem::replace(&mut machine.running, true) => {
                info!(vm = name, "{name} runs again");
            }
            Event::Stop | Event::Resume => {}
            Event::Shutdown => info!(vm = name, "{name}'s guest has shut down"),
            Event::Panicked => warn!(vm = name, "{name}'s guest has panicked"),
        }
    }
}

impl ForeignDriver for Qemu {
    fn process(&self) -> PeerProcess {
        self.acquaintance.as_ref().map_or(PeerProcess::NotMet, Acquaintance::process)
    }

    fn hang_up(&mut self) {
        self.link = None;
    }

    fn vm(&mut self) -> &mut ForeignVm {
        &mut self.vm
    }

    async fn look(&mut self) -> Result<ForeignStatus, Error> {
        let mut link = self.link().await?;
        let outcome = self.question(&mut link).await;
        self.keep(link, outcome)
    }

    async fn ask_for(&mut self, target: Bytes) -> Result<(), Error> {
        let mut link = self.link().await?;
        let outcome = self.tell(&mut link, target).await;
        self.keep(link, outcome)
    }
}

/// Finds out what there is, and has QEMU ask the guest for statistics once a second.
async fn introduce(qmp: &mut Qmp) -> Result<Machine, Error> {
    let RunState { running } = qmp.execute("query-status", json!({})).await?;
    let balloon = has_balloon(qmp).await?;
    let statistics = find_balloon(qmp).await?;
    if let Some(path) = &statistics {
        poll_guest(qmp, path).await?;
    }
    Ok(Machine { balloon, statistics, running })
}

async fn has_balloon(qmp: &mut Qmp) -> Result<bool, Error> {
    match qmp.execute::<BalloonInfo>("query-balloon", json!({})).await {
        Ok(_) => Ok(true),
        Err(Error::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn find_balloon(qmp: &mut Qmp) -> Result<Option<String>, Error> {
    for place in QOM_PATHS {
        let children: Vec<Property> = qmp.execute("qom-list", json!({ "path": place })).await?;
        if let Some(child) = children.iter().find(|child| child.kind.starts_with("child<virtio-balloon")) {
            return Ok(Some(format!("{place}/{}", child.name)));
        }
    }
    Ok(None)
}

async fn poll_guest(qmp: &mut Qmp, path: &str) -> Result<(), Error> {
    let property = "guest-stats-polling-interval";
    let seconds: u64 = qmp.execute("qom-get", json!({ "path": path, "property": property })).await?;
    let wanted = POLLING_INTERVAL.as_secs();
    if seconds == 0 || seconds > wanted {
        let order = json!({ "path": path, "property": property, "value": wanted });
        qmp.execute::<Value>("qom-set", order).await?;
    }
    Ok(())
}

async fn actual(qmp: &mut Qmp, has: Bytes) -> Result<Bytes, Error> {
    let BalloonInfo { actual } = qmp.execute("query-balloon", json!({})).await?;
    // This is the guest's word: a value out of range counts as the most that it can have.
    Ok(u64::try_from(actual).map_or(has, |actual| Bytes(actual).min(has)))
}
