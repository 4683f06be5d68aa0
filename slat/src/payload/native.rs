//! The same machine code in this process, without a guest.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::chain::chain;
use super::code::Params;
use super::failure::Failure;
use super::memory::Mapping;
use super::vcpu::Round;
use super::{Payload, Place, Setup};
use crate::counters::pmu::{Pmu, Whose};
use crate::walk::PageSize;

/// Operations of one call, between which a round looks whether it must end. Every usual round is one call.
const SLICE: u64 = 16384;

/// How many operations the next call does, of `left`, with `links` pages and `done` operations behind it. A call
/// ends where a lap over the pages does, or does not reach that end: touches begin at the first page.
fn slice(done: u64, left: u64, links: u64) -> u64 {
    let most = if links > SLICE { SLICE.min(links - done % links) } else { SLICE / links * links };
    most.min(left)
}

/// Runs warm-up and `rounds` measured rounds of a payload in this process; gives up after `limit` or when `stop`
/// is set.
///
/// # Errors
/// Where the payload has no native form, memory can't be had, or it does not come to its end.
pub fn run(setup: &Setup, rounds: usize, limit: Duration, stop: &AtomicBool) -> Result<Vec<Round>, Failure> {
    if setup.place != Place::Native || !setup.payload.runs_natively() {
        return Err(Failure::Setup(format!("{} has no native form", setup.payload)));
    }
    if setup.vcpus != 1 {
        return Err(Failure::Setup("native code runs on one thread".into()));
    }
    let deadline = Instant::now() + limit;
    let failure = |source: io::Error| Failure::Memory { backing: setup.backing, size: setup.data, source };
    let operation = setup.payload.label().operation();
    let mut measured = Vec::new();
    while measured.len() < rounds {
        let mapping = Mapping::new(setup.data, setup.backing).map_err(failure)?;
        if setup.present {
            mapping.populate().map_err(failure)?;
        }
        let start = mapping.start();
        if setup.payload == Payload::Chase {
            chain(setup.links(), start as u64, |offset, link| {
                // SAFETY: links lie in the mapping, which nobody else knows, on 8 bytes each.
                unsafe { start.add(offset as usize).cast::<u64>().write(link) };
                Ok::<(), Failure>(())
            })?;
        }
        let params = Params::default();
        Params::set(&params.pages, setup.links());
        Params::set(&params.stride, PageSize::Size4K.bytes());
        Params::set(&params.cursor, start as u64);
        // The time and the ticks of these operations, without what comes between calls.
        let call = |operations: u64| {
            let (mut elapsed, mut spent, mut done) = (Duration::ZERO, 0_u64, 0);
            while done < operations {
                if stop.load(Ordering::SeqCst) {
                    return Err(Failure::Interrupted);
                }
                if Instant::now() >= deadline {
                    return Err(Failure::Hung(limit));
                }
                let next = slice(done, operations - done, setup.links());
                Params::set(&params.base, start as u64 + done % setup.links() * PageSize::Size4K.bytes());
                Params::set(&params.n, next);
                let (begin, first) = (Instant::now(), ticks());
                // SAFETY: this operation uses no privileged instruction, keeps the C calling
                // convention, and touches only the parameters and the mapping they point to:
                // a slice that begins within a lap stays within it.
                unsafe { operation(&raw const params) };
                spent = spent.saturating_add(ticks().saturating_sub(first));
                elapsed += begin.elapsed();
                done += next;
            }
            Ok((elapsed, spent))
        };
        call(setup.warm())?;
        // A payload whose first time counts gets fresh memory each round.
        let here = if setup.payload.once() { 1 } else { rounds };
        let mut pmu = Pmu::of_this_thread(Whose::Own).ok();
        for _ in 0..here {
            if let Some(pmu) = &mut pmu {
                pmu.start();
            }
            let (elapsed, spent) = call(setup.operations)?;
            let walks = pmu.as_mut().map(Pmu::stop).unwrap_or_default();
            let ticks = Some(spent);
            measured.push(Round { elapsed, ticks, walks, huge: mapping.huge_share(), ..Round::default() });
        }
    }
    Ok(measured)
}

/// The time-stamp counter, with nothing moved across the reading.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has both instructions.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        let ticks = core::arch::x86_64::_rdtsc();
        core::arch::x86_64::_mm_lfence();
        ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: Duration = Duration::from_secs(60);
    static GO_ON: AtomicBool = AtomicBool::new(false);

    #[test]
    fn native_payloads_run() {
        for payload in Payload::ALL {
            let setup = Setup::usual(payload).at(Place::Native);
            let result = run(&setup, 3, LIMIT, &GO_ON);
            assert_eq!(result.is_ok(), payload.runs_natively(), "{payload}: {result:?}");
        }
        let two = Setup { vcpus: 2, ..Setup::usual(Payload::Chase).at(Place::Native) };
        assert!(matches!(run(&two, 1, LIMIT, &GO_ON), Err(Failure::Setup(_))));
    }

    #[test]
    fn the_limit_and_ctrl_c_reach_a_round() {
        for payload in Payload::ALL.into_iter().filter(|payload| payload.runs_natively()) {
            let endless = Setup { operations: 1 << 60, ..Setup::usual(payload).at(Place::Native) };
            let late = run(&endless, 1, Duration::from_millis(50), &GO_ON);
            assert!(matches!(late, Err(Failure::Hung(_))), "{payload}: {late:?}");
            let stop = AtomicBool::new(false);
            let stopped = std::thread::scope(|scope| {
                let measuring = scope.spawn(|| run(&endless, 1, LIMIT, &stop));
                stop.store(true, Ordering::SeqCst);
                measuring.join().expect("no panic")
            });
            assert!(matches!(stopped, Err(Failure::Interrupted)), "{payload}: {stopped:?}");
        }
    }

    #[test]
    fn a_usual_round_is_one_call() {
        for payload in Payload::ALL.into_iter().filter(|payload| payload.runs_natively()) {
            let setup = Setup::usual(payload);
            assert_eq!(slice(0, setup.operations, setup.links()), setup.operations, "{payload}");
        }
    }

    proptest! {
        #[test]
        fn slices_add_up_and_never_wrap_within_a_lap(operations in 1u64..200_000, links in 1u64..100_000) {
            let mut done = 0;
            while done < operations {
                let next = slice(done, operations - done, links);
                prop_assert!(next > 0 && next <= SLICE);
                let from = done % links;
                prop_assert!(from == 0 || from + next <= links, "{done} {next}");
                done += next;
            }
            prop_assert_eq!(done, operations);
        }
    }
}
