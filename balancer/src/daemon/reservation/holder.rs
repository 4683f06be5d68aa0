//! The process that is to hold a VM's memory, as long as only the kernel can tell what of it is there.
//!
//! A VM with `--prefault` touches its memory before it has a socket. From then on this memory is in no
//! account of the host's free memory, and the VM can't say yet that it is the one who holds it.

use std::time::Duration;

use balloon::units::Bytes;
use serde::{Deserialize, Serialize};

use crate::driver::process;

/// A process. Its start tells it from another that has its number later, or in another PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since the host's boot: field 22 of proc_pid_stat(5).
    pub started_ticks: u64,
}

impl Process {
    /// This one; `None` where `/proc` does not tell.
    pub fn own() -> Option<Self> {
        let pid = std::process::id();
        Some(Self { pid, started_ticks: process::started(pid)? })
    }

    /// What of the host's memory is its own; `None` where it has ended or the kernel does not say.
    pub fn held(self) -> Option<Bytes> {
        let held = process::own(self.pid)?;
        (process::started(self.pid)? == self.started_ticks).then_some(held)
    }
}

/// What a process has come to hold since it asked for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    process: Process,
    /// What it held then; `None` until it was first looked at.
    before: Option<Bytes>,
    #[serde(skip)]
    touched: Bytes,
}

impl Holder {
    /// One that nobody has looked at yet. The first look is to come before it is granted anything.
    pub fn new(process: Process) -> Self {
        Self { process, before: None, touched: Bytes::ZERO }
    }

    /// Looks at it; at most `granted` of what it holds is the VM's. True where it has come to hold more.
    pub fn look(&mut self, granted: Bytes, held: impl Fn(Process) -> Option<Bytes>) -> bool {
        let touched = held(self.process).map_or(Bytes::ZERO, |held| {
            let before = *self.before.get_or_insert(held);
            held.saturating_sub(before).min(granted)
        });
        std::mem::replace(&mut self.touched, touched) < touched
    }

    /// What of the VM's memory the host holds already.
    pub fn touched(&self) -> Bytes {
        self.touched
    }
}

/// For how long a reservation stands on from `now` whose VM has just touched more of its memory.
pub fn prolonged(until: Duration, now: Duration, life: Duration) -> Option<Duration> {
    // Not at each look: it is written down.
    (until.saturating_sub(now) < life / 2).then_some(now + life)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_this_very_process_holds_counts() {
        let own = Process::own().unwrap();
        let before = own.held().unwrap();
        let touched = vec![1_u8; 32 << 20];
        assert!(own.held().unwrap() >= before + Bytes::mib(32), "{before}");
        drop(touched);
        let another = Process { started_ticks: own.started_ticks + 1, ..own };
        assert_eq!(another.held(), None);
    }

    #[test]
    fn what_it_held_before_is_not_the_vms_nor_what_is_beyond_the_grant() {
        let mut holder = Holder::new(Process { pid: 1, started_ticks: 1 });
        let mut looks = [10, 10, 60, 50, 500].map(Bytes::mib).into_iter().map(Some).chain([None]);
        let mut seen = Vec::new();
        for _ in 0..6 {
            let held = looks.next().unwrap();
            seen.push((holder.look(Bytes::mib(100), |_| held), holder.touched().0 >> 20));
        }
        assert_eq!(seen, [(false, 0), (false, 0), (true, 50), (false, 40), (true, 100), (false, 0)]);
    }
}
