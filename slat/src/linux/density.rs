//! Density: guests are added until their sessions answer too late, or memory runs short.
//!
//! Each guest is one session: it thinks, then answers, half by its own work and half by the kernel's
//! (programs, mappings, pipes). In the deterministic lab the clock is the count of instructions of one
//! processor that does a thousand million of them a second, so that answers are exact too. How many
//! sessions fit depends on that mix and on the limit: it is one point, not a law.

use std::io::{self, BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use balloon::units::Bytes;
use serde::{Deserialize, Serialize};

use super::doorbell::Note;
use super::guest::bells;
use crate::host::available_memory;

/// A session whose slowest twentieth answers are later than this is one too many.
pub const LATEST: Duration = Duration::from_millis(60);
/// Memory of a guest.
const MEMORY: &str = "128M";
/// Answers of each guest that count for a step.
const ANSWERS: usize = 8;
/// Guests at most: what an emulated host can bear in minutes.
const MOST: usize = 8;
/// Host memory that must stay free.
const RESERVE: Bytes = Bytes::mib(256);
/// How long to wait for a guest, by the host's own clock.
const PATIENCE: Duration = Duration::from_secs(600);

/// Answers with a number of guests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Guests.
    pub guests: usize,
    /// Median of an answer in milliseconds.
    pub median: f64,
    /// 19 of 20 answers came within this many milliseconds.
    pub p95: f64,
}

/// How many sessions a host bore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Density {
    /// Most guests whose sessions all answered in time.
    pub sessions: usize,
    /// What stopped it.
    pub ended_by: String,
    /// Each number of guests.
    pub steps: Vec<Step>,
}

/// An answer of a guest, or its first sign of life.
struct Answer {
    guest: usize,
    took: Option<Duration>,
}

struct Running(Vec<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        for guest in &mut self.0 {
            // One that has ended by itself can't be killed; that is all the same here.
            let _ = guest.kill();
            let _ = guest.wait();
        }
    }
}

/// Adds guests until one too many is there.
///
/// # Errors
/// Where a guest can't be started or does not come up.
pub fn density() -> io::Result<Density> {
    let mut running = Running(Vec::new());
    let (sender, receiver) = channel();
    let mut steps: Vec<Step> = Vec::new();
    let ended_by = loop {
        if running.0.len() == MOST {
            break format!("{MOST} guests, as many as were to be started");
        }
        if available_memory().is_some_and(|free| free < RESERVE) {
            break format!("less than {RESERVE} of the host's memory left");
        }
        let mut guest = super::start(MEMORY, false, &["sessions"])?;
        let output = guest.stdout.take().ok_or_else(|| super::unfinished("has no pipe"))?;
        follow(running.0.len(), BufReader::new(output), sender.clone());
        running.0.push(guest);
        let step = step(&receiver, running.0.len())?;
        eprintln!("{} guests: {:.1} ms, p95 {:.1} ms", step.guests, step.median, step.p95);
        steps.push(step);
        if step.p95 > LATEST.as_secs_f64() * 1e3 {
            break format!("answers later than {} ms", LATEST.as_millis());
        }
    };
    let in_time = |step: &&Step| step.p95 <= LATEST.as_secs_f64() * 1e3;
    let sessions = steps.iter().filter(in_time).map(|step| step.guests).max().unwrap_or(0);
    Ok(Density { sessions, ended_by, steps })
}

/// Reads a guest's notes on a thread of its own, until it ends.
fn follow(guest: usize, output: impl BufRead + Send + 'static, sender: Sender<Answer>) {
    let (begin, end) = bells(0);
    thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            let Ok(notes) = serde_json::from_str::<Vec<Note>>(&line) else { return };
            let at = |bell| notes.iter().find(|note| note.bell == bell).map(|note| note.nanoseconds);
            let took = at(begin).zip(at(end)).map(|(b, e)| Duration::from_nanos(e.saturating_sub(b)));
            if sender.send(Answer { guest, took }).is_err() {
                return;
            }
        }
    });
}

/// Waits for the newest guest's first sign, then for enough answers of all.
fn step(receiver: &Receiver<Answer>, guests: usize) -> io::Result<Step> {
    let deadline = Instant::now() + PATIENCE;
    let mut newest = false;
    let mut answers: Vec<Vec<f64>> = vec![Vec::new(); guests];
    while !newest || answers.iter().any(|of| of.len() < ANSWERS) {
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = receiver.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => super::unfinished(format!("did not answer within {PATIENCE:?}")),
            RecvTimeoutError::Disconnected => super::unfinished("has gone"),
        })?;
        // Its first answer still pays for what comes in the first time.
        let first = answer.guest + 1 == guests && !newest;
        newest |= first && answer.took.is_some();
        if let (Some(took), Some(of), true, false) =
            (answer.took, answers.get_mut(answer.guest), newest, first)
        {
            of.push(took.as_secs_f64() * 1e3);
        }
    }
    let mut all: Vec<f64> = answers.into_iter().flatten().collect();
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all.get((all.len() as f64 * share) as usize).or(all.last()).copied().unwrap_or(0.0);
    Ok(Step { guests, median: at(0.5), p95: at(0.95) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_waits_for_the_newest_and_counts_all() {
        let (sender, receiver) = channel();
        let answer = |guest, took| sender.send(Answer { guest, took: Some(Duration::from_millis(took)) });
        // Before the newest has answered once, nothing counts.
        answer(0, 900).expect("sent");
        sender.send(Answer { guest: 1, took: None }).expect("sent");
        answer(1, 800).expect("sent");
        for took in 1..=ANSWERS as u64 {
            answer(0, took).expect("sent");
            answer(1, took * 10).expect("sent");
        }
        let step = step(&receiver, 2).expect("enough");
        assert_eq!((step.guests, step.p95), (2, 80.0));
        assert!(step.median > 7.0 && step.median < 11.0, "{step:?}");
    }
}
