//! The same machine code in this process, without a guest.

use std::io;
use std::time::Instant;

use super::code::Params;
use super::machine::{Failure, Round};
use super::memory::Mapping;
use super::{Payload, Place, Setup};
use crate::counters::pmu::{Pmu, Whose};

/// Writes a chain of `links` pointers, one a 4 KiB page, that visits all in
/// random order and comes back to the first: the same order each time.
///
/// `write` takes the offset of a link and its value, which is `base` plus the offset of the next.
///
/// # Errors
/// What `write` says.
pub fn chain<E>(links: u64, base: u64, mut write: impl FnMut(u64, u64) -> Result<(), E>) -> Result<(), E> {
    let mut order: Vec<u64> = (0..links).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    // Sattolo's shuffle gives one single cycle.
    for i in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(i, (state % i as u64) as usize);
    }
    // Each in another line of its page, or all would fight for one set of the cache; the first at 0.
    let offset = |page: u64| page * 4096 + page % 64 * 64;
    let mut from = 0;
    for _ in 0..links {
        let to = order.get(from as usize).copied().unwrap_or(0);
        write(offset(from), base + offset(to))?;
        from = to;
    }
    Ok(())
}

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
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn a_chain_visits_every_page_once(links in 1u64..2000) {
            let mut memory = BTreeMap::new();
            chain(links, 1 << 40, |offset, link| { memory.insert(offset, link); Ok::<(), ()>(()) }).expect("no error");
            let mut at = 0;
            for _ in 0..links {
                at = memory.remove(&at).expect("a link") - (1 << 40);
            }
            prop_assert_eq!(at, 0);
            prop_assert!(memory.is_empty());
        }
    }

    #[test]
    fn native_payloads_run() {
        for payload in Payload::ALL {
            let setup = Setup::usual(payload).at(Place::Native);
            let result = run(&setup, 3);
            assert_eq!(result.is_ok(), payload.runs_natively(), "{payload}: {result:?}");
        }
    }
}
