//! The system calls of a running VM, and with which arguments.

use std::collections::BTreeMap;

use devices::sandbox::{Argument, Call, SandboxNeeds};
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::paths::{Kept, address_of};
use crate::api_server::BACKLOG;

mod search;

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
    // The heap and stacks.
    libc::SYS_brk,
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

/// The filter for the kernel: what every VM does, and what its devices do beside. Paths that it may remove are
/// `kept`.
pub(super) fn filter(needs: &SandboxNeeds, kept: &Kept) -> Result<BpfProgram, BackendError> {
    composed(rules(needs, kept)?)
}

/// A filter that searches for the call, and looks at arguments only where they matter.
fn composed(rules: Rules) -> Result<BpfProgram, BackendError> {
    let mut program = search::program(&rules);
    let with_arguments = rules.into_iter().filter(|(_, rules)| !rules.is_empty()).collect();
    program.extend(program_of(with_arguments)?);
    Ok(program)
}

/// What is allowed: a call with any arguments where it has no rule, else with those of one of its rules.
type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// A filter that looks at one call after the other.
fn program_of(rules: Rules) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn rules(needs: &SandboxNeeds, kept: &Kept) -> Result<Rules, BackendError> {
    use SeccompCmpOp::{Eq, Ge, Lt, MaskedEq};

    let own_process = u64::from(std::process::id());
    let mut rules: Rules = ALWAYS.iter().map(|&call| (call, Vec::new())).collect();
    let mut allow = |call, conditions: Vec<SeccompCondition>| {
        rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok::<_, BackendError>(())
    };
    // A KVM request, or one of few others.
    allow(libc::SYS_ioctl, vec![number(1, MaskedEq(REQUEST_TYPE), KVM_REQUESTS)?])?;
    for &request in REQUESTS {
        allow(libc::SYS_ioctl, vec![number(1, Eq, request)?])?;
    }
    for &command in COMMANDS {
        allow(libc::SYS_fcntl, vec![number(1, Eq, command as u64)?])?;
    }
    let no_signals = number(2, MaskedEq(libc::O_ASYNC as u64), 0)?;
    allow(libc::SYS_fcntl, vec![number(1, Eq, libc::F_SETFL as u64)?, no_signals])?;
    // Advice above that breaks the host's memory (MADV_HWPOISON and MADV_SOFT_OFFLINE).
    allow(libc::SYS_madvise, vec![number(2, Lt, libc::MADV_HWPOISON as u64)?])?;
    // Nothing new becomes code, and nothing takes the place of the kept paths.
    let no_code = number(2, MaskedEq(libc::PROT_EXEC as u64), 0)?;
    let above = address(0, Ge, kept.end)?;
    // At address 0 the kernel chooses, unless it is told to take just that one.
    let chosen = number(3, MaskedEq(libc::MAP_FIXED as u64), 0)?;
    allow(libc::SYS_mmap, vec![no_code.clone(), address(0, Eq, 0)?, chosen])?;
    allow(libc::SYS_mmap, vec![no_code.clone(), above.clone()])?;
    allow(libc::SYS_mprotect, vec![no_code, above.clone()])?;
    allow(libc::SYS_munmap, vec![above.clone()])?;
    allow(libc::SYS_mremap, vec![above, number(3, MaskedEq(libc::MREMAP_FIXED as u64), 0)?])?;
    for path in &kept.paths {
        let (here, path) = (number(0, Eq, libc::AT_FDCWD as u64)?, address(1, Eq, path.as_ptr() as usize)?);
        allow(libc::SYS_newfstatat, vec![here.clone(), path.clone()])?;
        allow(libc::SYS_unlinkat, vec![here, path, number(2, Eq, 0)?])?;
    }
    // A socket of its own that somebody has removed is made again: a listener, private, at a kept path.
    for path in &kept.paths {
        let (start, length) = address_of(path);
        allow(libc::SYS_bind, vec![address(1, Eq, start)?, number(2, Eq, length as u64)?])?;
    }
    for path in &kept.others {
        let (start, length) = address_of(path);
        allow(libc::SYS_connect, vec![address(1, Eq, start)?, number(2, Eq, length as u64)?])?;
    }
    if !(kept.paths.is_empty() && kept.others.is_empty()) {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let (unix, stream) = (number(0, Eq, libc::AF_UNIX as u64)?, number(1, Eq, kind as u64)?);
        allow(libc::SYS_socket, vec![unix, stream])?;
    }
    if !kept.paths.is_empty() {
        allow(libc::SYS_fchmod, vec![number(1, Eq, u64::from(libc::S_IRUSR | libc::S_IWUSR))?])?;
        allow(libc::SYS_listen, vec![number(1, Eq, u64::from(BACKLOG.unsigned_abs()))?])?;
    }
    if !needs.read.is_empty() {
        // Landlock says which files; what is opened can only be read.
        let reads = number(2, MaskedEq(WRITES & !(libc::O_DIRECTORY as u64)), 0)?;
        allow(libc::SYS_openat, vec![reads])?;
    }
    // To clients that are connected, and nobody else.
    allow(libc::SYS_sendto, vec![address(4, Eq, 0)?])?;
    // Signals go to this process's own threads only: kicks for vCPUs, and abort().
    allow(libc::SYS_tgkill, vec![number(0, Eq, own_process)?])?;
    allow(libc::SYS_prctl, vec![number(0, Eq, libc::PR_SET_NAME as u64)?])?;
    for &Call { number: call, argument } in &needs.calls {
        match argument {
            // No rule at all allows the call with any arguments.
            None => drop(rules.insert(call, Vec::new())),
            Some(_) if rules.get(&call).is_some_and(Vec::is_empty) => {}
            Some(Argument { index, value }) => {
                let rule = SeccompRule::new(vec![number(index, Eq, value)?])?;
                rules.entry(call).or_default().push(rule);
            }
        }
    }
    Ok(rules)
}

/// Holds where argument `index` compares to `value`. Requests, flags and numbers of processes and
/// descriptors are 32 bits wide in the kernel, whatever the upper half holds.
fn number(index: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, compare, value & u64::from(u32::MAX))
}

/// Holds where argument `index`, an address, compares to `value`.
fn address(index: u8, compare: SeccompCmpOp, value: usize) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, compare, value as u64)
}

#[cfg(test)]
mod tests;
