//! The same machine code in this process, without a guest.

use std::io;
use std::time::Instant;

use super::chain::chain;
use super::code::Params;
use super::failure::Failure;
use super::memory::Mapping;
use super::vcpu::Round;
use super::{Payload, Place, Setup};
use crate::counters::pmu::{Pmu, Whose};

/// Runs warm-up and `rounds` measured rounds of a payload in this process.
///
/// # Errors
/// Where the payload has no native form, or memory can't be had.
pub fn run(setup: &Setup, rounds: usize) -> Result<Vec<Round>, Failure> {
    if setup.place != Place::Native || !setup.payload.runs_natively() {
        return Err(Failure::Setup(format!("{} has no native form", setup.payload)));
    }
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
        Params::set(&params.base, start as u64);
        Params::set(&params.pages, setup.links());
        Params::set(&params.stride, 4096);
        Params::set(&params.cursor, start as u64);
        let call = |operations: u64| {
            Params::set(&params.n, operations);
            // SAFETY: this operation uses no privileged instruction, keeps the C calling
            // convention, and touches only the parameters and the mapping they point to.
            unsafe { operation(&raw const params) };
        };
        if setup.warm() > 0 {
            call(setup.warm());
        }
        // A payload whose first time counts gets fresh memory each round.
        let here = if setup.payload.once() { 1 } else { rounds };
        let mut pmu = Pmu::of_this_thread(Whose::Own).ok();
        for _ in 0..here {
            if let Some(pmu) = &mut pmu {
                pmu.start();
            }
            let (begin, first) = (Instant::now(), ticks());
            call(setup.operations);
            let ticks = Some(ticks().saturating_sub(first));
            let elapsed = begin.elapsed();
            let walks = pmu.as_mut().map(Pmu::stop).unwrap_or_default();
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

    #[test]
    fn native_payloads_run() {
        for payload in Payload::ALL {
            let setup = Setup::usual(payload).at(Place::Native);
            let result = run(&setup, 3);
            assert_eq!(result.is_ok(), payload.runs_natively(), "{payload}: {result:?}");
        }
    }
}
