//! The system calls of a running VM, and with which arguments.

use std::collections::BTreeMap;

use devices::sandbox::{Argument, Call};
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Calls that are allowed whatever their arguments: they work on what is open already, on this
/// process's own memory, or on time.
const ALWAYS: &[c_long] = &[
    // What is open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_dup,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_readlink,
    // The heap and stacks.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Events.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    // Clients of sockets that listen already.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    // Threads that run already, and their end.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// The type byte of KVM's requests (`linux/kvm.h`: `KVMIO`).
const KVM_REQUESTS: u64 = 0xae00;
/// Where the type byte is in a request (`asm-generic/ioctl.h`).
const REQUEST_TYPE: u64 = 0xff00;

/// Requests to files: reads that don't wait.
const REQUESTS: &[u64] = &[libc::FIONBIO, libc::FIONREAD];

/// What `fcntl` may do. `F_SETOWN` and `F_SETSIG` are not among it: they have the kernel send any
/// signal to any process of this user when a descriptor gets ready (fcntl(2)). Nor are the requests
/// `FIOASYNC`, `FIOSETOWN` and `SIOCSPGRP` among those above.
const COMMANDS: &[libc::c_int] = &[libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC];

/// Flags of an `open` that can change something.
const WRITES: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_TMPFILE) as u64;

/// The filter for the kernel: what every VM does, and what its `devices` do beside.
pub(super) fn filter(devices: &[Call]) -> Result<BpfProgram, BackendError> {
    let own_process = u64::from(std::process::id());
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        ALWAYS.iter().map(|&call| (call, Vec::new())).collect();
    // A KVM request, or one of few others.
    let mut requests = vec![rule(1, SeccompCmpOp::MaskedEq(REQUEST_TYPE), KVM_REQUESTS)?];
    for &request in REQUESTS {
        requests.push(rule(1, SeccompCmpOp::Eq, request)?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    let mut commands = Vec::new();
    for &command in COMMANDS {
        commands.push(rule(1, SeccompCmpOp::Eq, command as u64)?);
    }
    let flags = condition(2, SeccompCmpOp::MaskedEq(libc::O_ASYNC as u64), 0)?;
    commands.push(SeccompRule::new(vec![condition(1, SeccompCmpOp::Eq, libc::F_SETFL as u64)?, flags])?);
    rules.insert(libc::SYS_fcntl, commands);
    // Nothing new becomes code.
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, executable.clone(), 0)?]);
    }
    // Landlock says which files; what is opened can only be read.
    let reads = rule(2, SeccompCmpOp::MaskedEq(WRITES & !(libc::O_DIRECTORY as u64)), 0)?;
    rules.insert(libc::SYS_openat, vec![reads]);
    // Signals go to this process's own threads only: kicks for vCPUs, and abort().
    rules.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Eq, own_process)?]);
    rules.insert(libc::SYS_prctl, vec![rule(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?]);
    for call in devices {
        allow(&mut rules, call)?;
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Adds a call to those that are allowed.
fn allow(rules: &mut BTreeMap<c_long, Vec<SeccompRule>>, call: &Call) -> Result<(), BackendError> {
    match (call.argument, rules.get_mut(&call.number)) {
        // No rule at all allows the call with any arguments.
        (None, _) => drop(rules.insert(call.number, Vec::new())),
        (Some(_), Some(any)) if any.is_empty() => {}
        (Some(Argument { index, value }), _) => {
            let rule = rule(index, SeccompCmpOp::Eq, value)?;
            rules.entry(call.number).or_default().push(rule);
        }
    }
    Ok(())
}

/// Allows a call when argument `index` compares to `value`.
fn rule(index: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![condition(index, compare, value)?])
}

/// Holds where argument `index` compares to `value`.
fn condition(index: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    // Requests, flags and process numbers are 32 bits wide in the kernel, whatever the upper half holds.
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, compare, value)
}
