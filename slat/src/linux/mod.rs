//! Workloads of a stock Linux guest, in an emulated host.
//!
//! [`guest`] is the guest's first process, [`doorbell`] a VM in which it runs: the guest rings before and
//! after each workload, and while it stands still the host notes its clock and KVM's counters. In the
//! deterministic lab a nanosecond of that clock is one instruction of the whole emulated host.
//! [`density`] adds guests until they answer too late.

pub mod density;
pub mod doorbell;
pub mod guest;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::counters::reasons;
use doorbell::{BOOTED, Note};
use guest::{WORK, bells};

/// Where an emulated host keeps the guest's kernel and initramfs.
pub const KERNEL: &str = "/guest/vmlinuz";
/// See [`KERNEL`].
pub const INITRD: &str = "/guest/initrd";
/// This program in a Linux guest, as its first process.
pub const GUEST_INIT: &str = "/ballast";
/// Room for a fork with the 33 MiB of the two last workloads.
const MEMORY: &str = "192M";

/// One workload's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// `boot`, `fork`, ...
    pub name: String,
    /// How often it was done.
    pub operations: u64,
    /// Nanoseconds for each, or instructions where the clock counts those.
    pub ticks: f64,
    /// VM exits for each, less port I/O and the host's interrupts; `None` for the boot, or where the
    /// host gives no counters.
    pub exits: Option<f64>,
    /// Exits for each by reason, where they were traced.
    #[serde(default)]
    pub reasons: BTreeMap<String, f64>,
}

/// What a visit does with Linux guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guests {
    /// Nothing.
    None,
    /// Every workload, counted.
    Workloads,
    /// Every workload, with each exit's reason: tracing costs time, so that times are left out.
    Reasons,
    /// More and more of them.
    Density,
}

/// Starts a guest with a doorbell in a process of its own.
fn start(memory: &str, counting: bool, words: &[&str]) -> io::Result<Child> {
    let mut command = Command::new(lab::INIT);
    command.args(["slat", "vm", "--kernel", KERNEL, "--initrd", INITRD, "--memory", memory]);
    if counting {
        command.arg("--counting");
    }
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()
}

fn unfinished(what: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("the Linux guest {what}"))
}

/// Runs every workload in one guest, and tells each exit's reason where `traced`.
///
/// # Errors
/// Where there is no guest's kernel, or the guest does not come to its end.
pub fn workloads(traced: bool) -> io::Result<Vec<Workload>> {
    if !Path::new(KERNEL).try_exists()? {
        return Err(io::Error::other("this host has no kernel for a Linux guest"));
    }
    let trace = traced.then(reasons::Trace::start).transpose()?;
    let mut vm = start(MEMORY, true, &[])?;
    let output = vm.stdout.take().ok_or_else(|| unfinished("has no pipe"))?;
    let mut notes: Vec<Note> = Vec::new();
    for line in BufReader::new(output).lines() {
        notes.extend(serde_json::from_str::<Vec<Note>>(&line?)?);
    }
    let status = vm.wait()?;
    drop(trace);
    let workloads = evaluate(&notes);
    if workloads.len() < WORK.len() + 1 {
        return Err(unfinished(format!("ended ({status}) after {} workloads", workloads.len())));
    }
    Ok(workloads)
}

fn evaluate(notes: &[Note]) -> Vec<Workload> {
    let note = |bell| notes.iter().find(|note| note.bell == bell);
    let boot = note(BOOTED).map(|booted| Workload {
        name: "boot".into(),
        operations: 1,
        ticks: booted.nanoseconds as f64,
        exits: None,
        reasons: BTreeMap::new(),
    });
    let work = (0..).zip(&WORK).filter_map(|(number, work)| {
        let (begin, end) = bells(number);
        let (begin, end) = (note(begin)?, note(end)?);
        let each = |now: u64, then: u64| now.saturating_sub(then) as f64 / work.operations as f64;
        let reasons = end.reasons.iter().map(|(reason, count)| {
            (reason.clone(), each(*count, begin.reasons.get(reason).copied().unwrap_or(0)))
        });
        Some(Workload {
            name: work.name.into(),
            operations: work.operations,
            ticks: each(end.nanoseconds, begin.nanoseconds),
            exits: begin.exits.zip(end.exits).map(|(then, now)| each(now, then)),
            reasons: reasons.filter(|(_, count)| *count > 0.0).collect(),
        })
    });
    boot.into_iter().chain(work).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_become_figures_and_lost_ones_are_left_out() {
        let note = |bell, nanoseconds, exits, faults| Note {
            bell,
            nanoseconds,
            exits,
            reasons: [("#PF".to_owned(), faults)].into(),
        };
        let notes = [
            note(BOOTED, 1000, Some(5), 0),
            note(1, 2000, Some(10), 100),
            note(2, 4000, Some(310), 300),
            note(3, 5000, Some(310), 300),
        ];
        let found = evaluate(&notes);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].name.as_str(), found[0].ticks, found[0].exits), ("boot", 1000.0, None));
        assert_eq!((found[1].name.as_str(), found[1].ticks, found[1].exits), ("fork", 20.0, Some(3.0)));
        assert_eq!(found[1].reasons.get("#PF"), Some(&2.0));
    }
}
