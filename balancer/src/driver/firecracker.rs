//! A Firecracker VM: HTTP and JSON over its API socket.
//!
//! Written from Firecracker's published API description (`swagger/firecracker.yaml`). It tells the guest's
//! size, the balloon's target and size in MiB, and the guest's statistics if they were enabled before the
//! boot. It does not tell when those came (see `UNCHANGED`).

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::client::{DEFAULT_TIMEOUT, Http, Peer, PeerProcess};
use api::limits::Wanted;
use api::status::{AgedReport, DriverState};
use api::units::Bytes;
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Error;
use super::foreign::{ForeignDriver, ForeignStatus, ForeignVm};
use super::statistics::{self, Names};

/// How long unchanged statistics count as new: an idle guest has no news, and Firecracker does not tell
/// whether a guest has stopped reporting.
const UNCHANGED: Duration = Duration::from_secs(10);

/// How often Firecracker is to ask the guest for statistics.
const POLLING_INTERVAL: Duration = Duration::from_secs(1);

/// Firecracker's names of the statistics (the last six since 1.14).
const NAMES: Names = "\
    swap_in swap_out major_faults minor_faults free_memory total_memory available_memory disk_caches \
    hugetlb_allocations hugetlb_failures oom_kill alloc_stall async_scan direct_scan async_reclaim \
    direct_reclaim";

/// `GET /`.
#[derive(Deserialize)]
struct InstanceInfo {
    state: String,
}

/// `GET /machine-config`, as far as it matters here.
#[derive(Deserialize)]
struct MachineConfiguration {
    mem_size_mib: u64,
}

/// `GET /balloon`.
#[derive(Deserialize)]
struct Balloon {
    /// What the guest is asked to give up.
    amount_mib: u64,
    #[serde(default)]
    stats_polling_interval_s: u64,
}

/// `GET /balloon/statistics`.
#[derive(Deserialize)]
struct Statistics {
    /// What the guest has given up, in 4 KiB pages.
    actual_pages: u64,
    #[serde(flatten)]
    guest: BTreeMap<String, Value>,
}

/// The body of an error.
#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

fn sentence(body: &[u8]) -> Option<String> {
    serde_json::from_slice(body).ok().map(|fault: Fault| fault.fault_message)
}

static PEER: Peer = Peer {
    version: None,
    sentence,
    where_to_look: "",
    should_be: "is it the API socket of a Firecracker VM?",
};

/// The driver of one Firecracker VM.
pub struct Firecracker {
    http: Http,
    vm: ForeignVm,
    /// Firecracker is known to ask the guest for statistics often enough.
    polled: bool,
}

impl Firecracker {
    /// The VM whose API listens at `socket`, with these limits; without any, its memory
    /// stays as it is. Connects at the first request.
    pub fn new(socket: impl Into<PathBuf>, limits: Option<Wanted>) -> Self {
        Self {
            http: Http::new(&PEER, socket.into(), DEFAULT_TIMEOUT),
            vm: ForeignVm::new(limits),
            polled: false,
        }
    }

    /// The same with another limit for each request.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.http.set_timeout(timeout);
        self
    }

    async fn size(&mut self) -> Result<Bytes, Error> {
        let MachineConfiguration { mem_size_mib } = self.http.get("/machine-config").await?;
        Ok(mebibytes(mem_size_mib))
    }

    /// The balloon, if there is one.
    async fn balloon(&mut self) -> Result<Option<Balloon>, Error> {
        let balloon: Balloon = match self.http.get("/balloon").await {
            Ok(balloon) => balloon,
            Err(Error::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let wanted = POLLING_INTERVAL.as_secs();
        // Statistics that were off at boot can't be switched on.
        if !self.polled && balloon.stats_polling_interval_s > wanted {
            let order = json!({ "stats_polling_interval_s": wanted });
            self.http.send(Method::PATCH, "/balloon/statistics", &order).await?;
        }
        self.polled = true;
        Ok(Some(balloon))
    }

    fn report(&mut self, answer: &Statistics) -> Result<Option<AgedReport>, Error> {
        let report = statistics::read(NAMES, &answer.guest)
            .map_err(|what| self.http.nonsense("GET /balloon/statistics".to_owned(), &what))?;
        if report == api::report::Report::default() {
            return Ok(None);
        }
        let mut digest = DefaultHasher::new();
        for (name, value) in &answer.guest {
            (name, value.as_u64()).hash(&mut digest);
        }
        let unchanged = self.vm.age.of(Instant::now(), digest.finish(), UNCHANGED);
        Ok(Some(statistics::aged(unchanged.saturating_sub(UNCHANGED), report)))
    }
}

impl ForeignDriver for Firecracker {
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
        let InstanceInfo { state } = self.http.get("/").await?;
        if self.vm.meet(self.http.process()) {
            self.polled = false;
        }
        let has = self.size().await?;
        let balloon = self.balloon().await?;
        let (mut actual, mut report) = (has, None);
        if let Some(Balloon { stats_polling_interval_s: 1.., .. }) = balloon {
            let answer: Statistics = self.http.get("/balloon/statistics").await?;
            let given_up = Bytes(answer.actual_pages.saturating_mul(api::units::PAGE_SIZE));
            actual = has.saturating_sub(given_up);
            report = self.report(&answer)?;
        }
        let driver = match &balloon {
            None => DriverState::Absent,
            Some(_) if state != "Running" => DriverState::Silent,
            Some(_) if report.is_some() || actual < has => DriverState::Active,
            Some(_) => DriverState::Absent,
        };
        Ok(ForeignStatus {
            has,
            target: balloon.map_or(has, |balloon| has.saturating_sub(mebibytes(balloon.amount_mib))),
            actual,
            driver,
            report,
        })
    }

    async fn ask_for(&mut self, target: Bytes) -> Result<(), Error> {
        let has = self.size().await?;
        // In whole MiB, rounded so that the guest gets no more than was granted.
        let amount = has.saturating_sub(target).0.div_ceil(1 << 20);
        self.http.send(Method::PATCH, "/balloon", &json!({ "amount_mib": amount })).await
    }
}

fn mebibytes(count: u64) -> Bytes {
    Bytes(count.saturating_mul(1 << 20))
}
