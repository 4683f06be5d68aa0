//! The front of the filter: what is decided by a call's number alone, found by binary search.
//!
//! seccompiler compares a call with one number after the other. The kernel runs a new filter for each of its
//! some 450 calls, to remember those that it always allows (`seccomp_cache_prepare_bitmap`), and that alone takes
//! a VM over a millisecond of its start. The front says yes or no to nearly all of them after six or seven
//! comparisons, and leaves calls whose arguments matter to seccompiler's program behind it.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

use super::Rules;

// Instructions (linux/bpf_common.h): load a word of the call, jump, return.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Where `struct seccomp_data` (linux/seccomp.h) has the number and the architecture.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;

/// What a number decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaf {
    Allow,
    Refuse,
    /// The program behind this one looks at the arguments.
    GoOn,
}

/// A program for what `rules` say of numbers; it ends where the next instruction is the one behind it, whose
/// registers hold nothing of interest.
pub(super) fn program(rules: &Rules) -> BpfProgram {
    let search = search(&runs(rules));
    // Numbers of another architecture are for the program behind to refuse.
    let mut program = vec![
        step(LOAD, ARCHITECTURE),
        sock_filter { code: JUMP_IF_EQUAL, jt: 1, jf: 0, k: X86_64 },
        step(JUMP, search.len() as u32 + 1),
        step(LOAD, NUMBER),
    ];
    let len = search.len();
    program.extend(search.into_iter().enumerate().map(|(place, step)| match step {
        Step::Other(step) => step,
        Step::GoOn => self::step(JUMP, (len - place - 1) as u32),
    }));
    program
}

/// An instruction, or a jump behind the program, whose length is not known yet.
enum Step {
    Other(sock_filter),
    GoOn,
}

const fn step(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Where runs of numbers with the same leaf begin; the first is at 0.
fn runs(rules: &Rules) -> Vec<(u32, Leaf)> {
    let mut leaves = BTreeMap::from([(0, Leaf::Refuse)]);
    for (&call, rules) in rules {
        let Ok(call) = u32::try_from(call) else { continue };
        leaves.insert(call, if rules.is_empty() { Leaf::Allow } else { Leaf::GoOn });
        if let Some(next) = call.checked_add(1) {
            leaves.insert(next, Leaf::Refuse);
        }
    }
    let mut runs: Vec<_> = leaves.into_iter().collect();
    runs.dedup_by_key(|(_, leaf)| *leaf);
    runs
}

/// Looks up the number in `runs`, of which there is one at least.
fn search(runs: &[(u32, Leaf)]) -> Vec<Step> {
    let (lower, upper) = runs.split_at(runs.len() / 2);
    let [(middle, leaf), ..] = upper else { return Vec::new() };
    if lower.is_empty() {
        return vec![match leaf {
            Leaf::Allow => Step::Other(step(RETURN, libc::SECCOMP_RET_ALLOW)),
            Leaf::Refuse => Step::Other(step(RETURN, libc::SECCOMP_RET_TRAP)),
            Leaf::GoOn => Step::GoOn,
        }];
    }
    let (lower, upper) = (search(lower), search(upper));
    // A comparison jumps over 255 instructions at most, a plain jump over any number.
    let mut all = match u8::try_from(lower.len()) {
        Ok(over) => vec![Step::Other(sock_filter { code: JUMP_IF_NOT_LESS, jt: over, jf: 0, k: *middle })],
        Err(_) => vec![
            Step::Other(sock_filter { code: JUMP_IF_NOT_LESS, jt: 0, jf: 1, k: *middle }),
            Step::Other(step(JUMP, lower.len() as u32)),
        ],
    };
    all.extend(lower);
    all.extend(upper);
    all
}
