//! Density: guests are added until their sessions answer too late, or memory runs short.
//!
//! Each guest is one session: it thinks, then answers, half by its own work and half by the kernel's
//! (programs, mappings, pipes). In the deterministic lab the clock is the count of instructions of one
//! processor that does a thousand million of them a second, so that answers are exact too. How many
//! sessions fit depends on that mix and on the limit: it is one point, not a law.

use std::io::{self, BufRead, BufReader, Write};
use std::process::Child;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::doorbell::Note;
use super::guest::{SESSIONS, bells};
use crate::host::available_memory;

/// A session whose slowest twentieth answers are later than this is one too many.
pub const LATEST: Duration = Duration::from_millis(60);
/// Memory of a guest.
const MEMORY: &str = "128M";
/// Answers of each guest that count for a step.
const ANSWERS: usize = 8;
/// Guests at most: what an emulated host can bear in minutes.
const MOST: usize = 12;
/// Host memory that must stay free.
const RESERVE: Bytes = Bytes::mib(256);
/// How long to wait for enough answers, by the host's own clock: ten times what the slowest step took.
const PATIENCE: Duration = Duration::from_secs(30);

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
    /// Whether it was stopped before one too many was there, so that it is not known how many would fit.
    #[serde(default)]
    pub unsettled: bool,
    /// Each number of guests.
    pub steps: Vec<Step>,
}

/// An answer of a guest, or its first sign of life.
struct Answer {
    guest: usize,
    took: Option<Duration>,
}

/// A guest with its session; killed when dropped.
struct Session {
    guest: usize,
    child: Option<Child>,
    /// Its first answer still pays for what comes in the first time.
    fresh: bool,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // One that has ended by itself can't be killed; that is all the same here.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(guest: usize, sender: &Sender<Answer>) -> io::Result<Session> {
    let mut child = super::start(MEMORY, false, &[SESSIONS])?;
    let output = child.stdout.take().ok_or_else(|| super::unfinished("has no pipe"))?;
    // Whatever comes now ends the guest.
    let session = Session { guest, child: Some(child), fresh: true };
    follow(guest, BufReader::new(output), sender.clone())?;
    Ok(session)
}

/// Adds guests until one too many is there. `tell` hears of each number of guests: what is known by then, should
/// the host not come to its end.
///
/// # Errors
/// Where a guest can't be started.
pub fn density(mut tell: impl FnMut(Density)) -> io::Result<Density> {
    let (sender, receiver) = channel();
    let mut sessions: Vec<Session> = Vec::new();
    let mut steps: Vec<Step> = Vec::new();
    let ended_by = loop {
        if steps.len() == MOST {
            break format!("{MOST} guests, as many as were to be started");
        }
        if available_memory().is_some_and(|free| free < RESERVE) {
            break format!("less than {RESERVE} of the host's memory left");
        }
        sessions.push(start(sessions.len(), &sender)?);
        let Ok(step) = step(&receiver, &mut sessions, PATIENCE) else {
            return Ok(Density::of(steps, "guests that answer no more".into()));
        };
        // A word on how far it is, which ends nothing where it can't be written.
        let _ =
            writeln!(io::stderr(), "{} guests: {:.1} ms, p95 {:.1} ms", step.guests, step.median, step.p95);
        steps.push(step);
        if !step.is_in_time() {
            break format!("answers later than {} ms", LATEST.as_millis());
        }
        tell(Density::of(steps.clone(), "an emulated host that stood still".into()));
    };
    Ok(Density::of(steps, ended_by))
}

impl Density {
    /// Only a step that was late tells that one more would have been one too many.
    fn of(steps: Vec<Step>, ended_by: String) -> Self {
        let unsettled = steps.iter().all(Step::is_in_time);
        let in_time = steps.iter().filter(|step| step.is_in_time());
        Self { sessions: in_time.map(|step| step.guests).max().unwrap_or(0), ended_by, unsettled, steps }
    }
}

impl Step {
    fn is_in_time(&self) -> bool {
        self.p95 <= LATEST.as_secs_f64() * 1e3
    }
}

/// Reads a guest's notes on a thread of its own, until it ends.
///
/// # Errors
/// Where there is no thread to be had.
fn follow(guest: usize, output: impl BufRead + Send + 'static, sender: Sender<Answer>) -> io::Result<()> {
    let (begin, end) = bells(0);
    let reading = thread::Builder::new().spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            let Ok(notes) = serde_json::from_str::<Vec<Note>>(&line) else { return };
            let at = |bell| notes.iter().find(|note| note.bell == bell).map(|note| note.nanoseconds);
            let took = at(begin).zip(at(end)).map(|(b, e)| Duration::from_nanos(e.saturating_sub(b)));
            if sender.send(Answer { guest, took }).is_err() {
                return;
            }
        }
    });
    reading.map(drop)
}

/// Waits until no guest is fresh, then for enough answers of all.
///
/// # Errors
/// The guests that had not answered enough when patience ended.
fn step(
    receiver: &Receiver<Answer>,
    sessions: &mut [Session],
    patience: Duration,
) -> Result<Step, Vec<usize>> {
    let deadline = Instant::now() + patience;
    let mut answers: Vec<Vec<f64>> = vec![Vec::new(); sessions.len()];
    while sessions.iter().any(|s| s.fresh) || answers.iter().any(|of| of.len() < ANSWERS) {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(answer) = receiver.recv_timeout(left) else {
            let late = sessions.iter().zip(&answers).filter(|(_, of)| of.len() < ANSWERS);
            return Err(late.map(|(session, _)| session.guest).collect());
        };
        let all_settled = sessions.iter().all(|session| !session.fresh);
        let found = sessions.iter_mut().zip(&mut answers).find(|(session, _)| session.guest == answer.guest);
        let (Some((session, of)), Some(took)) = (found, answer.took) else { continue };
        match (session.fresh, all_settled) {
            (true, _) => session.fresh = false,
            (false, true) => of.push(took.as_secs_f64() * 1e3),
            (false, false) => {}
        }
    }
    let mut all: Vec<f64> = answers.into_iter().flatten().collect();
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all.get((all.len() as f64 * share) as usize).or(all.last()).copied().unwrap_or(0.0);
    Ok(Step { guests: sessions.len(), median: at(0.5), p95: at(0.95) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(guest: usize, fresh: bool) -> Session {
        Session { guest, child: None, fresh }
    }

    #[test]
    fn a_step_waits_for_the_newest_and_counts_all() {
        let (sender, receiver) = channel();
        let answer = |guest, took| sender.send(Answer { guest, took: Some(Duration::from_millis(took)) });
        // Before the newest has answered once, nothing counts; nor does one that nobody knows.
        answer(0, 900).expect("sent");
        sender.send(Answer { guest: 1, took: None }).expect("sent");
        answer(7, 700).expect("sent");
        answer(1, 800).expect("sent");
        for took in 1..=ANSWERS as u64 {
            answer(0, took).expect("sent");
            answer(1, took * 10).expect("sent");
        }
        let mut sessions = [session(0, false), session(1, true)];
        let step = step(&receiver, &mut sessions, PATIENCE).expect("enough");
        assert_eq!((step.guests, step.p95), (2, 80.0));
        assert!(step.median > 7.0 && step.median < 11.0, "{step:?}");
        assert!(!sessions[1].fresh);
    }

    #[test]
    fn those_that_are_silent_are_named() {
        let (sender, receiver) = channel();
        for _ in 0..ANSWERS {
            let answer = Answer { guest: 3, took: Some(Duration::from_millis(1)) };
            sender.send(answer).expect("sent");
        }
        sender.send(Answer { guest: 4, took: None }).expect("sent");
        let mut sessions = [session(3, false), session(4, false)];
        // All that will come is there already: no patience is needed to read it.
        let silent = step(&receiver, &mut sessions, Duration::from_millis(100)).err();
        assert_eq!(silent, Some(vec![4]), "a guest that has booted has not answered");
    }

    #[test]
    fn what_is_late_does_not_count_as_served() {
        let late = LATEST.as_secs_f64() * 1e3 + 0.1;
        let step = |guests, p95| Step { guests, median: 1.0, p95 };
        let density = Density::of(vec![step(1, 10.0), step(2, 60.0), step(3, late)], String::new());
        assert_eq!((density.sessions, density.unsettled), (2, false));
        // Memory ran short, or there were guests enough: nobody knows how many would have fitted.
        let short = Density::of(vec![step(1, 10.0), step(2, 60.0)], "memory".into());
        assert_eq!((short.sessions, short.unsettled), (2, true));
        let none = Density::of(vec![], String::new());
        assert_eq!((none.sessions, none.unsettled), (0, true));
    }
}
