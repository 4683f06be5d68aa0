//! What was measured of each spike, and what that comes to.

use std::time::{Duration, Instant};

use crate::Mode;

/// One spike of one guest, in moments of the host's clock.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub mode: Mode,
    /// The guest's tasks began to wait; `None` where memory came before they had to.
    pub onset: Option<Instant>,
    /// The VM heard the agent's last call before the grant was seen; `None` without an agent.
    pub called: Option<Instant>,
    /// The VM had taken the target that answers the wait; before the onset where that one sufficed.
    pub granted: Option<Instant>,
    /// The guest had half of what it was granted.
    pub has: Instant,
    /// How far the onset may be wrong.
    pub doubt: Duration,
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
        let since = |then: Instant| sample.onset.map(|onset| milliseconds(onset, then));
        println!(
            "latency: {:?}: target after {:?} ms, memory after {:?} ms (+-{} ms)",
            sample.mode,
            sample.granted.and_then(since),
            since(sample.has),
            sample.doubt.as_millis()
        );
        self.all.push(sample);
    }

    /// A line for each thing that was waited for.
    pub fn print(&self, name: &str) {
        let early = self.all.iter().filter(|sample| sample.onset.is_none()).count();
        for (what, moment) in [
            ("call heard", (|sample: &Sample| sample.called) as fn(&Sample) -> Option<Instant>),
            ("target raised", |sample| sample.granted),
            ("guest has half of the grant", |sample| Some(sample.has)),
        ] {
            let waits = self.all.iter();
            let waits = waits.filter_map(|sample| Some(milliseconds(sample.onset?, moment(sample)?)));
            let mut waits: Vec<i128> = waits.collect();
            waits.sort_unstable();
            let (Some(p50), Some(p99)) = (rank(&waits, 50), rank(&waits, 99)) else { continue };
            println!("{name:<8} {what:<28} n={:<3} p50 {p50:>6}   p99 {p99:>6}", waits.len());
        }
        let doubt = self.all.iter().map(|sample| sample.doubt).max().unwrap_or_default();
        println!(
            "{name:<8} granted before the guest had to wait: {early}; clocks agree within {} ms (half of a line to \
             a guest and back)",
            doubt.as_millis()
        );
    }
}

/// From one moment to another, below zero where that came first.
fn milliseconds(from: Instant, to: Instant) -> i128 {
    match to.checked_duration_since(from) {
        Some(after) => after.as_millis() as i128,
        None => -((from - to).as_millis() as i128),
    }
}

/// The nearest-rank percentile of sorted values.
fn rank(sorted: &[i128], percent: usize) -> Option<i128> {
    let place = (sorted.len() * percent).div_ceil(100);
    sorted.get(place.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<i128> = (1..=20).collect();
        assert_eq!((rank(&values, 50), rank(&values, 99)), (Some(10), Some(20)));
        assert_eq!(rank(&[], 50), None);
    }
}
