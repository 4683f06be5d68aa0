//! What was measured of each spike, and what that comes to.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a line with a sample begins with.
const SAMPLE: &str = "SAMPLE ";

/// How the balancer answered one spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The guest had memory enough, or was granted it before it had to wait.
    NobodyWaited,
    /// It waited for what it had been granted shortly before.
    Earlier,
    /// It waited, and was granted more.
    After(Waits),
    /// It waited and was granted nothing: it lived on pages that its driver took back by itself.
    Never,
}

/// How long things took from when tasks of the guest began to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waits {
    /// Until the VM heard the agent; `None` without an agent.
    pub call: Option<Duration>,
    /// Until the VM had taken the next target.
    pub grant: Duration,
    /// Until the guest had half of that.
    pub memory: Option<Duration>,
}

/// What was seen of one spike, in moments of the host's clock.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The guest's tasks began to wait, if they did.
    pub onset: Option<Instant>,
    /// The balancer granted it something.
    pub grants: Vec<Instant>,
    /// The VM heard the agent's last call before the first grant was seen: it may seem to come a little before
    /// its wait, by as much as the clocks are apart.
    pub called: Option<Instant>,
    /// The guest had half of its first grant.
    pub has: Option<Instant>,
}

impl Seen {
    /// How the balancer answered.
    pub fn answer(&self) -> Answer {
        let Some(onset) = self.onset else { return Answer::NobodyWaited };
        match self.grants.iter().find(|grant| **grant >= onset) {
            Some(granted) => Answer::After(Waits {
                call: self
                    .called
                    .filter(|called| called <= granted)
                    .map(|called| called.saturating_duration_since(onset)),
                grant: *granted - onset,
                memory: self.has.filter(|has| has >= granted).map(|has| has - onset),
            }),
            None if self.grants.is_empty() => Answer::Never,
            None => Answer::Earlier,
        }
    }
}

/// One spike of one guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// How it was answered.
    pub answer: Answer,
    /// For how long tasks of the guest waited in all.
    pub waited: Duration,
    /// How far the onset may be wrong.
    pub doubt: Duration,
    /// Processes that guests killed for lack of memory.
    pub oom_kills: u64,
}

impl Sample {
    /// Says it, for people and for [`Samples::read`].
    pub fn say(&self, mode: &str) {
        let what = match self.answer {
            Answer::NobodyWaited => "nobody waited".to_owned(),
            Answer::Earlier => "waited for what was granted before".to_owned(),
            Answer::Never => "granted nothing".to_owned(),
            Answer::After(Waits { call, grant, memory }) => {
                let text =
                    |time: Option<Duration>| time.map_or("-".to_owned(), |time| time.as_millis().to_string());
                format!(
                    "call heard after {} ms, target raised after {} ms, memory after {} ms",
                    text(call),
                    text(Some(grant)),
                    text(memory)
                )
            }
        };
        let (waited, doubt) = (self.waited.as_millis(), self.doubt.as_micros());
        println!("latency: {mode}: {what}; waited {waited} ms in all (onset +-{doubt} us)");
        println!("{SAMPLE}{}", serde_json::to_string(self).expect("numbers can be written"));
    }
}

/// How long something took that was waited for, if it was.
type Measure = fn(&Waits) -> Option<Duration>;

/// All of one mode.
#[derive(Debug, Default)]
pub struct Samples(Vec<Sample>);

impl Samples {
    /// Adds those that a host has said.
    pub fn read(&mut self, said: &str) {
        let samples = said.lines().filter_map(|line| line.trim_end().strip_prefix(SAMPLE));
        self.0.extend(samples.filter_map(|sample| serde_json::from_str::<Sample>(sample).ok()));
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Processes that guests killed for lack of memory.
    pub fn oom_kills(&self) -> u64 {
        self.0.iter().map(|sample| sample.oom_kills).sum()
    }

    /// A line for each thing that was waited for, and what became of all other spikes.
    pub fn print(&self, name: &str) {
        let measures: [(&str, Measure); 3] = [
            ("call heard by the VM", |waits| waits.call),
            ("target raised", |waits| Some(waits.grant)),
            ("guest has half of the grant", |waits| waits.memory),
        ];
        let answered: Vec<Waits> = self
            .0
            .iter()
            .filter_map(|sample| if let Answer::After(waits) = sample.answer { Some(waits) } else { None })
            .collect();
        for (what, measure) in measures {
            let mut waits: Vec<Duration> = answered.iter().filter_map(measure).collect();
            waits.sort_unstable();
            let (Some(p50), Some(p99)) = (rank(&waits, 50), rank(&waits, 99)) else { continue };
            let (p50, p99) = (p50.as_millis(), p99.as_millis());
            println!("{name:<8} {what:<28} n={:<3} p50 {p50:>6}   p99 {p99:>6}", waits.len());
        }
        let all = self.0.len();
        let of = |answer: Answer| self.0.iter().filter(|sample| sample.answer == answer).count();
        println!(
            "{name:<8} {} of {all} spikes made nobody wait; {} waited for what was granted before the wait; {} were \
             granted nothing",
            of(Answer::NobodyWaited),
            of(Answer::Earlier),
            of(Answer::Never)
        );
        let doubt = self.0.iter().map(|sample| sample.doubt).max().unwrap_or_default();
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
        let grants = vec![at(1), at(3), at(5)];
        let seen = |onset: Option<u64>| Seen {
            onset: onset.map(at),
            grants: grants.clone(),
            called: Some(at(4)),
            has: Some(at(4)),
        };
        let waits = Waits { call: None, grant: Duration::from_secs(1), memory: Some(Duration::from_secs(2)) };
        assert_eq!(seen(Some(2)).answer(), Answer::After(waits), "the call came after the grant");
        assert_eq!(seen(Some(6)).answer(), Answer::Earlier);
        assert_eq!(seen(None).answer(), Answer::NobodyWaited);
        assert_eq!(Seen { grants: Vec::new(), ..seen(Some(1)) }.answer(), Answer::Never);
    }

    #[test]
    fn what_was_said_is_read_but_for_what_was_cut_off() {
        let sample = Sample {
            answer: Answer::Never,
            waited: Duration::from_millis(20),
            doubt: Duration::from_micros(3),
            oom_kills: 2,
        };
        let json = serde_json::to_string(&sample).unwrap();
        let mut samples = Samples::default();
        samples.read(&format!("INIT\r\nSAMPLE {json}\r\na| SAMPLE {json}\r\nSAMPLE {}", &json[..20]));
        assert_eq!((samples.len(), samples.oom_kills()), (1, 2));
    }
}
