//! What was seen of each guest and of the host, over time.

use std::time::Duration;

use api::status::{DriverState, MemoryStatus};
use api::units::Bytes;

/// One guest at one moment.
#[derive(Clone, Copy, Debug)]
pub struct GuestSample {
    /// What it uses, as it says; nothing before its first report.
    pub used: Option<Bytes>,
    /// What it has.
    pub actual: Bytes,
    /// What it may touch: as `actual`, but what the host holds once its driver has gone at its end.
    pub given: Bytes,
    /// What the balancer asks it to have.
    pub target: Bytes,
    /// What the host holds for it.
    pub rss: Bytes,
    /// What files it keeps in its page cache, as it says.
    pub cache: Option<Bytes>,
}

impl From<&MemoryStatus> for GuestSample {
    fn from(memory: &MemoryStatus) -> Self {
        // A guest that goes down resets its devices, and its balloon is empty then.
        let given = if memory.driver == DriverState::Absent {
            memory.host_rss.unwrap_or_default()
        } else {
            memory.actual
        };
        Self {
            used: memory.used(),
            actual: memory.actual,
            given,
            target: memory.target,
            rss: memory.host_rss.unwrap_or_default(),
            cache: memory.report.as_ref().and_then(|report| report.statistics.disk_caches),
        }
    }
}

/// All guests at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Since the first guest was started.
    pub time: Duration,
    /// In the order of [`History::guests`]; nothing for one that does not answer (not yet, or no more).
    pub guests: Vec<Option<GuestSample>>,
}

impl Sample {
    /// A sum over the guests that answer.
    pub fn sum(&self, part: impl Fn(&GuestSample) -> Bytes) -> Bytes {
        self.guests.iter().flatten().map(part).sum()
    }
}

/// One guest, and how it ended.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its name.
    pub name: &'static str,
    /// Never shrunk below.
    pub min: Bytes,
    /// Never grown above.
    pub max: Bytes,
    /// So much more than at its least it has once.
    pub gain: Bytes,
    /// Its process's exit code.
    pub exit: Option<i32>,
    /// Processes in it that were killed for lack of memory; nothing where it did not say.
    pub oom_kills: Option<u64>,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct History {
    /// What all guests together may hold.
    pub budget: Bytes,
    /// Who took part.
    pub guests: Vec<Guest>,
    /// What was seen, in order.
    pub samples: Vec<Sample>,
    /// When each guest had once come down to its target; before, first inflations are under way.
    pub settled: Option<Duration>,
}

impl History {
    /// The most of `part` that all guests ever had together, from `start` on.
    pub fn peak(&self, start: Duration, part: impl Fn(&GuestSample) -> Bytes) -> Bytes {
        let sums = self.samples.iter().filter(|sample| sample.time >= start).map(|sample| sample.sum(&part));
        sums.max().unwrap_or_default()
    }

    /// The most and the least of `part` that one guest had once all were settled.
    pub fn range(&self, guest: usize, part: impl Fn(&GuestSample) -> Option<Bytes>) -> (Bytes, Bytes) {
        let start = self.settled.unwrap_or_default();
        let settled = self.samples.iter().filter(|sample| sample.time >= start);
        let values: Vec<Bytes> =
            settled.filter_map(|sample| sample.guests[guest].as_ref().and_then(&part)).collect();
        (values.iter().min().copied().unwrap_or_default(), values.iter().max().copied().unwrap_or_default())
    }
}
