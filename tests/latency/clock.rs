//! A guest's clock beside the host's.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guests::{Vm, wait_looking_every};

/// How often an answer is looked for: a part of the doubt.
const CLOSELY: Duration = Duration::from_millis(1);

/// Questions of which the one that took least counts.
const QUESTIONS: usize = 5;

/// When the guest's clock stood at zero.
#[derive(Clone, Copy, Debug)]
pub struct Offset {
    zero: Instant,
    doubt: Duration,
}

impl Offset {
    /// Asks the guest what time it is, between two looks at the host's clock.
    pub fn measure(vm: &mut Vm, usually: Duration) -> Result<Self> {
        let mut best: Option<Self> = None;
        for _ in 0..QUESTIONS {
            let before = Instant::now();
            vm.type_in("clock\n");
            let line = wait_looking_every(CLOSELY, "the guest's clock", usually, || vm.line("CLOCK us="));
            let took = before.elapsed();
            vm.wait_for_line("DONE clock", usually);
            let guest = number(&line, "us=").context("the guest tells its clock")?;
            let zero = (before + took / 2).checked_sub(Duration::from_micros(guest));
            let zero = zero.context("the guest is no older than the host")?;
            if best.is_none_or(|best| took / 2 < best.doubt) {
                best = Some(Self { zero, doubt: took / 2 });
            }
        }
        best.context("it was asked")
    }

    /// A moment of the guest's clock on the host's; `None` where there was none.
    pub fn host_time(&self, guest_us: Option<u64>) -> Option<Instant> {
        Some(self.zero + Duration::from_micros(guest_us?))
    }

    /// How far it may be wrong.
    pub fn doubt(&self) -> Duration {
        self.doubt
    }
}

/// The number behind `name` in a line.
pub fn number(line: &str, name: &str) -> Option<u64> {
    let rest = line.split_once(name)?.1;
    rest.split_whitespace().next()?.parse().ok()
}
