//! What was measured of each spike, and what that comes to.

use std::time::{Duration, Instant};

use crate::Mode;

/// How the balancer answered one spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The guest had memory enough, or was granted it before it had to wait.
    NobodyWaited,
    /// It waited for what it had been granted shortly before.
    Earlier,
    /// It waited, and was granted more.
    After {
        /// Its tasks began to wait.
        onset: Instant,
        /// The VM had taken the next target.
        granted: Instant,
    },
    /// It waited and was granted nothing: it lived on pages that its driver took back by itself.
    Never,
}

impl Answer {
    /// Out of when the guest's tasks began to wait, if they did, and when it was granted something.
    pub fn of(onset: Option<Instant>, grants: &[Instant]) -> Self {
        let Some(onset) = onset else { return Self::NobodyWaited };
        match grants.iter().find(|grant| **grant >= onset) {
            Some(granted) => Self::After { onset, granted: *granted },
            None if grants.is_empty() => Self::Never,
            None => Self::Earlier,
        }
    }
}

/// One spike of one guest, in moments of the host's clock.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub mode: Mode,
    pub answer: Answer,
    /// The VM heard the agent's last call before the grant was seen; `None` without an agent.
    pub called: Option<Instant>,
    /// The guest had half of its first grant.
    pub has: Option<Instant>,
    /// For how long tasks of the guest waited in all.
    pub waited: Duration,
    /// How far the onset may be wrong.
    pub doubt: Duration,
}

/// How long something took that was waited for, if it was.
type Measure = fn(&Sample) -> Option<Duration>;

impl Sample {
    /// How long after the onset something was; `None` where the wait got no answer of its own.
    fn since_onset(&self, moment: impl Fn(&Self, Instant) -> Option<Instant>) -> Option<Duration> {
        let Answer::After { onset, granted } = self.answer else { return None };
        Some(moment(self, granted)?.saturating_duration_since(onset))
    }

    fn call(&self) -> Option<Duration> {
        self.since_onset(|sample, granted| sample.called.filter(|called| *called <= granted))
    }

    fn grant(&self) -> Option<Duration> {
        self.since_onset(|_, granted| Some(granted))
    }

    fn memory(&self) -> Option<Duration> {
        self.since_onset(|sample, granted| sample.has.filter(|has| *has >= granted))
    }
}

/// All of one mode.
#[derive(Debug, Default)]
pub struct Samples {
    all: Vec<Sample>,
    pub oom_kills: u64,
}

impl Samples {
    /// Adds one, and says it.
    pub fn add(&mut self, sample: Sample) {
        let what = match sample.answer {
            Answer::NobodyWaited => "nobody waited".to_owned(),
            Answer::Earlier => "waited for what was granted before".to_owned(),
            Answer::Never => "granted nothing".to_owned(),
            Answer::After { .. } => {
                let text =
                    |time: Option<Duration>| time.map_or("-".to_owned(), |time| time.as_millis().to_string());
                let (call, grant, memory) =
                    (text(sample.call()), text(sample.grant()), text(sample.memory()));
                format!(
                    "call heard after {call} ms, target raised after {grant} ms, memory after {memory} ms"
                )
            }
        };
        let (waited, doubt) = (sample.waited.as_millis(), sample.doubt.as_micros());
        println!("latency: {}: {what}; waited {waited} ms in all (onset +-{doubt} us)", sample.mode.name());
        self.all.push(sample);
    }

    /// A line for each thing that was waited for, and what became of all other spikes.
    pub fn print(&self, name: &str) {
        let measures: [(&str, Measure); 3] = [
            ("call heard by the VM", Sample::call),
            ("target raised", Sample::grant),
            ("guest has half of the grant", Sample::memory),
        ];
        for (what, measure) in measures {
            let mut waits: Vec<Duration> = self.all.iter().filter_map(measure).collect();
            waits.sort_unstable();
            let (Some(p50), Some(p99)) = (rank(&waits, 50), rank(&waits, 99)) else { continue };
            let (p50, p99) = (p50.as_millis(), p99.as_millis());
            println!("{name:<8} {what:<28} n={:<3} p50 {p50:>6}   p99 {p99:>6}", waits.len());
        }
        let all = self.all.len();
        let of = |answer: Answer| self.all.iter().filter(|sample| sample.answer == answer).count();
        println!(
            "{name:<8} {} of {all} spikes made nobody wait; {} waited for what was granted before the wait; {} were \
             granted nothing",
            of(Answer::NobodyWaited),
            of(Answer::Earlier),
            of(Answer::Never)
        );
        let doubt = self.all.iter().map(|sample| sample.doubt).max().unwrap_or_default();
        println!(
            "{name:<8} the clocks agree within {} us (half of a line to a guest and back)",
            doubt.as_micros()
        );
    }
}

/// The nearest-rank percentile of sorted values.
fn rank(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let place = (sorted.len() * percent).div_ceil(100);
    sorted.get(place.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<Duration> = (1..=20).map(Duration::from_millis).collect();
        let (p50, p99) = (rank(&values, 50).unwrap(), rank(&values, 99).unwrap());
        assert_eq!((p50.as_millis(), p99.as_millis()), (10, 20));
        assert_eq!(rank(&[], 50), None);
    }

    #[test]
    fn a_wait_is_answered_by_the_grant_that_follows_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let grants = [at(1), at(3), at(5)];
        assert_eq!(Answer::of(Some(at(2)), &grants), Answer::After { onset: at(2), granted: at(3) });
        assert_eq!(Answer::of(Some(at(6)), &grants), Answer::Earlier);
        assert_eq!(Answer::of(None, &grants), Answer::NobodyWaited);
        assert_eq!(Answer::of(Some(at(1)), &[]), Answer::Never);
    }
}
