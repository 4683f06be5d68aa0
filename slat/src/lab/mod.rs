//! SLAT on and off in throw-away hosts of the lab, where this same program runs as the first process.

pub mod findings;
pub mod host;
pub mod inside;
pub mod nested;
pub mod walks;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lab::InstalledKernel;
pub use lab::Vendor;

use crate::run::Run;
pub use findings::{Findings, Pair};
pub use host::Errand;
use host::{Host, Paging};

/// The name of what a host hands out.
const RESULT: &str = "result.json";

/// Why the lab gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No host.
    #[error(transparent)]
    Host(lab::Error),
    /// Something with files.
    #[error("{what}: {source}")]
    Files {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// What the emulator wrote down is not what was to be.
    #[error("the emulator's record of memory references: {0}")]
    Record(String),
    /// The host did not answer.
    #[error("the host gave no result: {0}; its last words:\n{1}")]
    NoResult(String, String),
    /// The user asked to stop.
    #[error("stopped before SLAT on and off were both counted: there is nothing to keep")]
    Interrupted,
}

/// Parts of a visit, to be put into what an earlier one found.
#[derive(Clone, Debug)]
pub struct Only {
    /// What is done anew.
    pub parts: Vec<Errand>,
    /// What was found before.
    pub before: Box<Findings>,
}

/// What to do in the lab.
#[derive(Clone, Debug)]
pub struct Visit {
    /// Whose virtualisation the hosts' processors have.
    pub vendor: Vendor,
    /// The parts to do; what else an earlier visit found is kept.
    pub only: Option<Only>,
    /// Count everything twice and compare.
    pub twice: bool,
    /// Add guests until they answer too late.
    pub density: bool,
    /// How long one emulated host may take.
    pub limit: Duration,
    /// Emulated hosts at a time: each keeps a processor busy.
    pub jobs: usize,
}

/// One emulated host's place in the findings.
type Place = (Paging, Errand, Round);

/// Whether something is counted for the first time or again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    First,
    Again,
}

impl Round {
    const fn words(self) -> &'static str {
        match self {
            Self::First => "",
            Self::Again => ", again",
        }
    }
}

/// What came of a host.
type Outcome = (Place, Result<Run, Error>);

impl Visit {
    /// Runs SLAT on and off, counting, in hosts with a kernel below `kernel_root`; then memory, the scaling over vCPUs, and density where asked for.
    ///
    /// What comes after the first count may fail, or be stopped: the findings then say what is missing.
    ///
    /// # Errors
    /// Where there is no kernel, counting gives nothing, or the user stops it.
    pub fn run(
        self,
        kernel_root: &Path,
        stop: &AtomicBool,
        progress: impl Fn(&str) + Sync,
        keep: impl Fn(&Findings) + Sync,
    ) -> Result<Findings, Error> {
        let kernel = &InstalledKernel::find(kernel_root, self.vendor).map_err(Error::Host)?;
        let waiting = Mutex::new(self.places());
        let outcomes = Mutex::new(Vec::new());
        let hopeless = AtomicBool::new(false);
        let stopped = || stop.load(Ordering::SeqCst) || hopeless.load(Ordering::SeqCst);
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = || {
            while let Some(place) = next().filter(|_| !stopped()) {
                let outcome = self.visit(place, kernel, &stopped, &progress);
                // Without the first count there is nothing to set the rest against.
                if outcome.is_err() && (place.1, place.2) == (Errand::Count, Round::First) {
                    hopeless.store(true, Ordering::SeqCst);
                }
                let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                outcomes.push((place, outcome));
                // What is there already is kept, should this process not come to its end.
                if let Ok(so_far) = self.findings(&outcomes, true) {
                    keep(&so_far);
                }
            }
        };
        thread::scope(|scope| {
            // This thread does its part. Where the kernel gives no more, fewer hosts run at a time.
            for _ in 1..self.jobs {
                if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
        let interrupted = stop.load(Ordering::SeqCst);
        let fatal = outcomes.iter().position(|(place, outcome)| {
            (place.1, place.2) == (Errand::Count, Round::First)
                && !matches!(outcome, Ok(_) | Err(Error::Interrupted))
        });
        self.findings(&outcomes, interrupted).map_err(|none| {
            let mut outcomes = outcomes;
            fatal.and_then(|at| outcomes.swap_remove(at).1.err()).unwrap_or(none)
        })
    }

    /// All hosts, in the order of what is missed most where the visit is stopped; the longest last.
    fn places(&self) -> VecDeque<Place> {
        let pair = |errand, round| [Paging::Nested, Paging::Shadow].map(|paging| (paging, errand, round));
        let mut places = VecDeque::from(pair(Errand::Count, Round::First));
        places.push_back((Paging::NestedOldMmu, Errand::Memory, Round::First));
        if self.twice {
            places.extend(pair(Errand::Count, Round::Again));
        }
        // Only kvm_intel can be told to leave tags out.
        places.push_back((Paging::Nested, Errand::Switches, Round::First));
        if self.vendor == Vendor::Intel {
            places.push_back((Paging::Untagged, Errand::Switches, Round::First));
        }
        // QEMU tells nothing of a walk.
        if self.vendor == Vendor::Intel {
            places.extend(pair(Errand::Walks, Round::First));
        }
        places.extend(pair(Errand::Scale, Round::First));
        places.extend(pair(Errand::Reasons, Round::First));
        if self.density {
            places.extend(pair(Errand::Density, Round::First));
        }
        if let Some(only) = &self.only {
            places.retain(|(_, errand, _)| only.parts.contains(errand));
        }
        places
    }

    const fn host(&self, paging: Paging, errand: Errand) -> Host {
        Host { vendor: self.vendor, paging, errand, limit: self.limit }
    }

    /// One host; once more where it gave nothing, or not all, as an emulator that is starved of processor time
    /// may stand still.
    fn visit(
        &self,
        (paging, errand, round): Place,
        kernel: &InstalledKernel,
        stopped: &(impl Fn() -> bool + Sync),
        progress: &(impl Fn(&str) + Sync),
    ) -> Result<Run, Error> {
        let host = self.host(paging, errand);
        let name = format!("{}{}", host.describe(), round.words());
        progress(&format!("{name}: begun"));
        let begin = Instant::now();
        let result = host.run(kernel, stopped);
        let result = match result {
            Err(error @ Error::NoResult(..)) => {
                progress(&format!("{name}: {error}\n{name}: once more"));
                host.run(kernel, stopped)
            }
            Ok(Run { linux_failure: Some(ref why), .. }) if !stopped() => {
                progress(&format!("{name}: {why}\n{name}: once more"));
                // A part is better than nothing.
                host.run(kernel, stopped).or(result)
            }
            result => result,
        };
        let seconds = begin.elapsed().as_secs();
        progress(&match &result {
            Ok(_) => format!("{name}: done in {seconds} s"),
            Err(Error::Interrupted) => format!("{name}: stopped after {seconds} s"),
            Err(error) => format!("{name}: nothing after {seconds} s: {error}"),
        });
        result
    }

    /// All that came of hosts so far, over what an earlier visit found.
    fn findings(&self, outcomes: &[Outcome], interrupted: bool) -> Result<Findings, Error> {
        let name = |place: &Place| self.host(place.0, place.1).describe();
        let failed = outcomes.iter().filter_map(|(place, outcome)| match outcome {
            Err(Error::Interrupted) | Ok(_) => None,
            Err(error) => Some(format!("{}: {error}", name(place))),
        });
        let not_redone = self.only.iter().flat_map(|only| {
            let redone = |why: &&String| only.parts.iter().any(|part| why.starts_with(part.words()));
            only.before.missing.iter().filter(move |why| !redone(why)).cloned()
        });
        let find = |paging, errand, round| {
            let found = outcomes.iter().find(|(place, _)| *place == (paging, errand, round))?;
            found.1.as_ref().ok().cloned()
        };
        let pair = |errand, round| {
            let (on, off) = (find(Paging::Nested, errand, round), find(Paging::Shadow, errand, round));
            Some(Pair { on: on?, off: off? })
        };
        let counted_now = pair(Errand::Count, Round::First);
        // A second count says nothing of a first that an earlier visit made, perhaps of another kernel.
        let again = counted_now.is_some().then(|| pair(Errand::Count, Round::Again)).flatten();
        let mut findings = match (counted_now, self.only.as_ref().map(|only| only.before.as_ref())) {
            (Some(counted), Some(before)) => {
                Findings { counted, twice: false, difference: None, ..before.clone() }
            }
            (None, Some(before)) => before.clone(),
            (Some(counted), None) => Findings::of(counted),
            (None, None) => return Err(Error::Interrupted),
        };
        if let Some(again) = again {
            findings.compare(&again);
        }
        let replace = |old: &mut Option<Pair>, errand| *old = pair(errand, Round::First).or(old.take());
        replace(&mut findings.scaling, Errand::Scale);
        replace(&mut findings.reasons, Errand::Reasons);
        replace(&mut findings.density, Errand::Density);
        replace(&mut findings.walks, Errand::Walks);
        findings.old_mmu =
            find(Paging::NestedOldMmu, Errand::Memory, Round::First).or(findings.old_mmu.take());
        for (paging, kept) in
            [(Paging::Nested, &mut findings.switches), (Paging::Untagged, &mut findings.untagged)]
        {
            *kept = find(paging, Errand::Switches, Round::First).or(kept.take());
        }
        findings.missing = not_redone.chain(failed).collect();
        // What an earlier visit did not come to is still not there.
        findings.interrupted = interrupted || findings.interrupted && !findings.is_whole();
        Ok(findings)
    }
}

#[cfg(test)]
mod tests;
