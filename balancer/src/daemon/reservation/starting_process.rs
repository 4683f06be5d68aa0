//! The process of a VM that starts, while only the kernel can tell what of its memory is there.
//!
//! A VM with `--prefault` touches its memory before it has a socket. That memory is no longer free on the
//! host, and the VM can't say yet that it holds it.

use std::time::Duration;

use api::units::{Bytes, whole};
use serde::{Deserialize, Serialize};

use crate::driver::process;

/// A process. Its start tells it from another one with the same number, later or in another PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number.
    #[serde(deserialize_with = "whole")]
    pub pid: u32,
    /// When it started, in clock ticks since the host's boot: field 22 of proc_pid_stat(5).
    #[serde(deserialize_with = "whole")]
    pub started_ticks: u64,
}

impl Process {
    /// This process; `None` if `/proc` does not tell.
    pub fn own() -> Option<Self> {
        Self::numbered(std::process::id())
    }

    /// The one that has this number now, if there is one.
    pub fn numbered(pid: u32) -> Option<Self> {
        Some(Self { pid, started_ticks: process::started(pid).ok()?? })
    }

    /// Whether it has not ended, as far as is known.
    pub fn runs(self) -> bool {
        process::started(self.pid).map_or(true, |started| started == Some(self.started_ticks))
    }

    /// What the kernel says of it.
    pub fn held(self) -> ProcessMemory {
        let held = process::own(self.pid);
        match (process::started(self.pid), held) {
            (Ok(Some(started)), Some(held)) if started == self.started_ticks => ProcessMemory::Holds(held),
            (Ok(Some(started)), None) if started == self.started_ticks => ProcessMemory::Unknown,
            (Ok(_), _) => ProcessMemory::Gone,
            (Err(_), _) => ProcessMemory::Unknown,
        }
    }
}

/// What is known of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessMemory {
    /// It holds so much of the host's memory.
    Holds(Bytes),
    /// No process has that number and start: it has ended, or lives in another PID namespace.
    Gone,
    /// The kernel does not say.
    Unknown,
}

/// What came of a look at a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// It holds no more than before, as far as is known.
    Same,
    /// It holds more.
    More,
    /// It was there, and has ended.
    Ended,
}

/// What a process has come to hold since it asked for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartingProcess {
    process: Process,
    /// What it held then; `None` until it was first looked at.
    before: Option<Bytes>,
    #[serde(skip)]
    touched: Bytes,
}

impl StartingProcess {
    /// Before the first look, which has to come before any grant.
    pub fn new(process: Process) -> Self {
        Self { process, before: None, touched: Bytes::ZERO }
    }

    /// Looks at it; at most `granted` of what it holds is the VM's.
    pub fn look(&mut self, granted: Bytes, held: impl Fn(Process) -> ProcessMemory) -> Growth {
        let touched = match held(self.process) {
            ProcessMemory::Holds(held) => {
                let before = *self.before.get_or_insert(held);
                held.saturating_sub(before).min(granted)
            }
            ProcessMemory::Gone if self.before.is_some() => return Growth::Ended,
            ProcessMemory::Gone | ProcessMemory::Unknown => Bytes::ZERO,
        };
        if std::mem::replace(&mut self.touched, touched) < touched { Growth::More } else { Growth::Same }
    }

    /// What of the VM's memory the host holds already.
    pub fn touched(&self) -> Bytes {
        self.touched
    }
}

/// Until when a reservation stands whose VM has just touched more memory, if that is to change.
pub fn prolonged(until: Duration, now: Duration, life: Duration) -> Option<Duration> {
    // Not at each look, as a change is written to a file.
    (until.saturating_sub(now) < life / 2).then_some(now + life)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn only_what_this_very_process_holds_counts() {
        let own = Process::own().unwrap();
        let held = || match own.held() {
            ProcessMemory::Holds(held) => held,
            other => panic!("{other:?}"),
        };
        let before = held();
        let touched = vec![1_u8; 32 << 20];
        assert!(held() >= before + Bytes::mib(32), "{before}");
        drop(touched);
        let another = Process { started_ticks: own.started_ticks + 1, ..own };
        assert_eq!(another.held(), ProcessMemory::Gone);
    }

    #[test]
    fn who_has_ended_is_gone_also_while_nobody_asks_how() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = child.id();
        let process = Process::numbered(pid).unwrap();
        assert!(process.runs());
        let mut starting = StartingProcess::new(process);
        assert_eq!(starting.look(Bytes::mib(1), Process::held), Growth::Same);
        child.kill().unwrap();
        // A zombie until it is waited for.
        while process.held() != ProcessMemory::Gone {
            thread::yield_now();
        }
        assert!(!process.runs());
        assert_eq!(starting.look(Bytes::mib(1), Process::held), Growth::Ended);
        child.wait().unwrap();
        assert_eq!(starting.look(Bytes::mib(1), Process::held), Growth::Ended);
        assert_eq!(
            StartingProcess::new(process).look(Bytes::mib(1), Process::held),
            Growth::Same,
            "who was never seen may live in another PID namespace"
        );
    }

    #[test]
    fn what_it_held_before_is_not_the_vms_nor_what_is_beyond_the_grant() {
        let mut starting = StartingProcess::new(Process { pid: 1, started_ticks: 1 });
        let looks = [10, 10, 60, 50, 500].map(|mib| ProcessMemory::Holds(Bytes::mib(mib)));
        let seen = looks.into_iter().chain([ProcessMemory::Unknown, ProcessMemory::Gone]).map(|held| {
            let look = starting.look(Bytes::mib(100), |_| held);
            (look, starting.touched().0 >> 20)
        });
        let seen: Vec<_> = seen.collect();
        use Growth::{Ended, More, Same};
        let expected = [(Same, 0), (Same, 0), (More, 50), (Same, 40), (More, 100), (Same, 0), (Ended, 0)];
        assert_eq!(seen, expected);
    }
}
