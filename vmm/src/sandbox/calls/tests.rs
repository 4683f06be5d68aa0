//! The filter as the kernel would run it, against the one that looks at call after call.

use std::path::PathBuf;

use proptest::collection::btree_map;
use proptest::prelude::*;

use super::*;

/// AUDIT_ARCH_X86_64 and AUDIT_ARCH_I386 (linux/audit.h).
const ARCHITECTURES: [u32; 2] = [0xc000_003e, 0x4000_0003];
/// `__X32_SYSCALL_BIT` (asm/unistd.h).
const X32: u32 = 0x4000_0000;

/// Runs a program on a call (kernel: net/core/filter.c, as far as seccomp takes it): the verdict, and how many
/// instructions it took.
fn run(program: &BpfProgram, architecture: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
    let mut data = vec![number, architecture, 0, 0];
    data.extend(arguments.iter().flat_map(|argument| [*argument as u32, (*argument >> 32) as u32]));
    let (mut at, mut value) = (0, 0_u32);
    for taken in 1..=program.len() {
        let step = &program[at];
        at += 1;
        let holds = match step.code {
            0x20 => {
                value = data[step.k as usize / 4];
                continue;
            }
            0x54 => {
                value &= step.k;
                continue;
            }
            0x06 => return (step.k, taken),
            0x05 => {
                at += step.k as usize;
                continue;
            }
            0x15 => value == step.k,
            0x25 => value > step.k,
            0x35 => value >= step.k,
            code => panic!("instruction {code:#x}"),
        };
        at += usize::from(if holds { step.jt } else { step.jf });
    }
    panic!("it has no end");
}

/// Arguments that some rule allows, and that others don't.
fn arguments() -> Vec<[u64; 6]> {
    let values = [0, 1, 2, 4, 0xae01, 0x5421, u64::from(std::process::id()), 1 << 20, 1 << 40, u64::MAX];
    let mut all = Vec::new();
    for first in values {
        for second in values {
            all.push([first, second, first, second, first, second]);
            all.push([first, second, 0, 0, 0, 0]);
        }
    }
    all
}

fn assert_same(rules: &Rules, numbers: impl Iterator<Item = u32> + Clone, arguments: &[[u64; 6]]) {
    let one_after_the_other = program_of(rules.clone()).unwrap();
    let searched = composed(rules.clone()).unwrap();
    for architecture in ARCHITECTURES {
        for number in numbers.clone() {
            for arguments in arguments {
                let [(expected, _), (found, _)] = [&one_after_the_other, &searched]
                    .map(|program| run(program, architecture, number, *arguments));
                assert_eq!(found, expected, "call {number} of {architecture:#x} with {arguments:x?}");
            }
        }
    }
}

#[test]
fn every_call_is_judged_as_if_looked_up_one_after_the_other() {
    let own = SandboxNeeds {
        read: vec![PathBuf::from("/etc/motd")],
        calls: vec![
            Call::any(libc::SYS_preadv),
            Call { number: libc::SYS_socket, argument: Some(Argument { index: 0, value: 1 }) },
        ],
        ..SandboxNeeds::default()
    };
    let kept = Kept { paths: vec![c"/run/web.sock"], others: Vec::new(), end: 1 << 20 };
    for needs in [SandboxNeeds::default(), own] {
        let rules = rules(&needs, &kept).unwrap();
        let edges = [X32, X32 + 1, i32::MAX as u32, u32::MAX];
        assert_same(&rules, (0..=512).chain(edges), &arguments());
    }
}

#[test]
fn a_call_with_no_look_at_its_arguments_is_judged_after_few_comparisons() {
    let kept = Kept { paths: Vec::new(), others: Vec::new(), end: 0 };
    let program = filter(&SandboxNeeds::default(), &kept).unwrap();
    for number in [libc::SYS_read, libc::SYS_futex, libc::SYS_getrandom, libc::SYS_execve, 450] {
        let (_, taken) = run(&program, ARCHITECTURES[0], number as u32, [0; 6]);
        assert!(taken <= 12, "call {number} takes {taken} instructions");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Lists of any length, also such that a comparison can't jump over a half of it.
    #[test]
    fn any_list_is_searched_right(calls in btree_map(0..2000_i64, any::<bool>(), 0..600)) {
        let rules = calls.into_iter().map(|(call, with_rule)| {
            let rule = || SeccompRule::new(vec![number(0, SeccompCmpOp::Eq, 1).unwrap()]).unwrap();
            (call, if with_rule { vec![rule()] } else { Vec::new() })
        });
        let rules: Rules = rules.collect();
        // The kernel takes 4096 instructions, and seccompiler makes no more.
        prop_assume!(program_of(rules.clone()).is_ok());
        assert_same(&rules, (0..2001).chain([u32::MAX]), &[[1; 6], [2; 6]]);
    }
}
