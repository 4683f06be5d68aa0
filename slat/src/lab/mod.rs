//! SLAT on and off in throw-away emulated hosts.
//!
//! QEMU's software emulation has AMD's SVM with nested paging. A Debian kernel
//! boots in it as a host, loads `kvm-amd` with `npt=1` or `npt=0`, and this
//! same program runs there as the first process. Nothing of the real host is
//! touched: no module, no setting, not even /dev/kvm.

pub mod archive;
pub mod emulator;
pub mod findings;
pub mod host;
pub mod inside;
pub mod nested;

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::run::Run;
use emulator::PROGRAM;
pub use findings::{Findings, Pair};
pub use host::Errand;
use host::{Host, Paging};

/// Modules of every host, in the order of loading.
const MODULE_FILES: [&str; 2] = ["kernel/virt/lib/irqbypass.ko", "kernel/arch/x86/kvm/kvm.ko"];
/// The module of an emulated processor, and of a nested host on AMD's.
const AMD: &str = "kernel/arch/x86/kvm/kvm-amd.ko";
/// The module of a nested host on Intel's processors.
const INTEL: &str = "kernel/arch/x86/kvm/kvm-intel.ko";

/// Why the lab gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kernel to boot.
    #[error(
        "no kernel with {1} below {0}: install linux-image-cloud-amd64, or unpack it anywhere with \
         `apt-get download` and `dpkg -x` and name the directory with --kernel-root"
    )]
    NoKernel(PathBuf, &'static str),
    /// No emulator.
    #[error("cannot start {PROGRAM}: {0}; install the package qemu-system-x86")]
    NoEmulator(io::Error),
    /// Something with files.
    #[error("{what}: {source}")]
    Files {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The emulated host did not answer.
    #[error("the emulated host gave no result {0}; its last words:\n{1}")]
    NoResult(String, String),
    /// The user asked to stop.
    #[error("stopped before SLAT on and off were both counted: there is nothing to keep")]
    Interrupted,
}

fn files(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Files { what, source }
}

/// A kernel and its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    image: PathBuf,
    modules: PathBuf,
    /// The module for the processor, below `modules`.
    module: &'static str,
}

impl Kernel {
    /// The first kernel below `root` (in `boot` and `lib/modules`) for an emulated host, whose processor is AMD's;
    /// Debian's cloud kernels before others, older before newer: counts are compared with those of 6.1.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn find(root: &Path) -> Result<Self, Error> {
        Self::with(root, AMD)
    }

    /// The same for a host whose processor takes `module`.
    fn with(root: &Path, module: &'static str) -> Result<Self, Error> {
        let none = || Error::NoKernel(root.to_owned(), if module == INTEL { "kvm-intel" } else { "kvm-amd" });
        let mut releases: Vec<String> = fs::read_dir(root.join("lib/modules"))
            .map_err(|_| none())?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .collect();
        releases.sort_by_key(|r| (!r.contains("cloud"), numbers(r)));
        releases
            .into_iter()
            .map(|release| Self {
                image: root.join("boot").join(format!("vmlinuz-{release}")),
                modules: root.join("lib/modules").join(release),
                module,
            })
            .find(|k| k.image.is_file() && k.modules().iter().all(|m| k.modules.join(m).is_file()))
            .ok_or_else(none)
    }

    /// The modules of a host that boots it, in the order of loading.
    fn modules(&self) -> [&'static str; 3] {
        let [first, second] = MODULE_FILES;
        [first, second, self.module]
    }
}

/// The numbers in a release, so that 6.12 comes after 6.1.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
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

/// Keeps this thread and what it starts on one of the processors that it may use: an emulator whose threads
/// move about can stand still for minutes.
fn stay_on(number: usize) {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: zeroed sets are empty ones; the kernel fills the first and reads the second. Indices are below
    // the size of a set. Where it fails nothing is lost but speed.
    unsafe {
        let mut usable: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size, &raw mut usable) != 0 {
            return;
        }
        let all: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &usable)).collect();
        let Some(&own) = all.get(number % all.len().max(1)) else { return };
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(own, &mut set);
        libc::sched_setaffinity(0, size, &raw const set);
    }
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
    /// Runs SLAT on and off, counting; then memory, the scaling over vCPUs, and density where asked for.
    ///
    /// What comes after the first count may fail, or be stopped: the findings then say what is missing.
    ///
    /// # Errors
    /// Where counting gives nothing, or the user stops it.
    pub fn run(
        self,
        kernel: &Kernel,
        stop: &AtomicBool,
        progress: impl Fn(&str) + Sync,
        keep: impl Fn(&Findings) + Sync,
    ) -> Result<Findings, Error> {
        let waiting = Mutex::new(self.places());
        let outcomes = Mutex::new(Vec::new());
        let hopeless = AtomicBool::new(false);
        let stopped = || stop.load(Ordering::SeqCst) || hopeless.load(Ordering::SeqCst);
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = &|| {
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
            for number in 0..self.jobs.max(1) {
                scope.spawn(move || {
                    stay_on(number);
                    work();
                });
            }
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

    /// One host; once more where it gave nothing, or not all, as an emulator that is starved of processor time
    /// may stand still.
    fn visit(
        &self,
        (paging, errand, round): Place,
        kernel: &Kernel,
        stopped: &(impl Fn() -> bool + Sync),
        progress: &(impl Fn(&str) + Sync),
    ) -> Result<Run, Error> {
        let host = Host { paging, errand, limit: self.limit };
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
        let name = |place: &Place| Host { paging: place.0, errand: place.1, limit: self.limit }.describe();
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
        findings.old_mmu =
            find(Paging::NestedOldMmu, Errand::Memory, Round::First).or(findings.old_mmu.take());
        findings.missing = not_redone.chain(failed).collect();
        // What an earlier visit did not come to is still not there.
        findings.interrupted = interrupted || findings.interrupted && !findings.is_whole();
        Ok(findings)
    }
}

#[cfg(test)]
mod tests;
