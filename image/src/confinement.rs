//! What a process that reads what others wrote can do from now on: read its standard input, write its standard output and error,
//! have memory, and end.

use std::collections::BTreeMap;

use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus};
use libc::c_long;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::Error;

/// Calls with any arguments: memory, and the end.
const ALWAYS: [c_long; 8] = [
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // A thread's signal stack goes with it.
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What the process may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Address space in bytes.
    pub memory: u64,
    /// Bytes of its output.
    pub output: u64,
    /// Processor time.
    pub seconds: u64,
}

/// Confines this process, for good. It has one thread.
///
/// # Errors
/// [`Error::Unconfined`]; then it must read nothing.
pub fn confine(limits: Limits) -> Result<(), Error> {
    let with = |error: &dyn std::fmt::Display| Error::Unconfined(error.to_string());
    // Nobody waits for it any more then.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|error| with(&error))?;
    for (resource, limit) in [
        (Resource::As, limits.memory),
        (Resource::Fsize, limits.output),
        (Resource::Cpu, limits.seconds),
        (Resource::Core, 0),
    ] {
        let least = |old: Option<u64>| Some(old.map_or(limit, |old| old.min(limit)));
        let old = getrlimit(resource);
        let new = Rlimit { current: least(old.current), maximum: least(old.maximum) };
        setrlimit(resource, new).map_err(|error| with(&error))?;
    }
    close_files().map_err(|error| with(&error))?;
    let filter = filter().map_err(|error| with(&error))?;
    seccompiler::apply_filter(&filter).map_err(|error| with(&error))
}

/// Landlock, with all rights of its first version and of later ones what the kernel knows.
fn close_files() -> Result<(), Box<dyn std::error::Error>> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V4))?
        .create()?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("Landlock is not enforced".into()),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};

    let number =
        |index, compare, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, compare, value);
    let rule = |conditions| Ok::<_, seccompiler::BackendError>(vec![SeccompRule::new(conditions)?]);
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        ALWAYS.iter().map(|&call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_read, rule(vec![number(0, Eq, 0)?])?);
    let mut outputs = rule(vec![number(0, Eq, 1)?])?;
    outputs.extend(rule(vec![number(0, Eq, 2)?])?);
    rules.insert(libc::SYS_write, outputs);
    let no_code = || number(2, MaskedEq(libc::PROT_EXEC as u64), 0);
    // New memory is of no file.
    let of_no_file = number(3, MaskedEq(libc::MAP_ANONYMOUS as u64), libc::MAP_ANONYMOUS as u64)?;
    rules.insert(libc::SYS_mmap, rule(vec![no_code()?, of_no_file])?);
    rules.insert(libc::SYS_mprotect, rule(vec![no_code()?])?);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus, Stdio};
    use std::{env, io, thread};

    /// Tells the child which of [`ACTS`] is its own.
    const ACT: &str = "CONFINEMENT_TEST_ACT";
    /// Ends a child that could do what it tried.
    const DONE: i32 = 77;

    type Act = fn() -> io::Result<()>;

    /// What a process that was taken over might try.
    const ACTS: [(&str, Act); 7] = [
        ("open a file", || File::open("/etc/passwd").map(drop)),
        ("make a socket", || TcpListener::bind("127.0.0.1:0").map(drop)),
        ("run a program", || Command::new("/bin/true").spawn().map(drop)),
        ("start a thread", || thread::Builder::new().spawn(|| ()).map(drop)),
        ("write to another file", || Ok(rustix::io::write(other_file(), b"x").map(|_| ())?)),
        ("read another file", || Ok(rustix::io::read(other_file(), &mut [0; 1]).map(|_| ())?)),
        ("raise a limit", || Ok(setrlimit(Resource::Core, Rlimit { current: None, maximum: None })?)),
    ];

    /// A descriptor that a careless parent has left to this process.
    fn other_file() -> io::PipeWriter {
        OTHER.with_borrow_mut(Option::take).expect("made before")
    }

    thread_local! {
        static OTHER: std::cell::RefCell<Option<io::PipeWriter>> = const { std::cell::RefCell::new(None) };
    }

    const LIMITS: Limits = Limits { memory: 1 << 30, output: 4096, seconds: 5 };

    /// Runs `test` again in a child with one of the acts.
    fn child(test: &str, act: usize) -> (ExitStatus, String) {
        let output = Command::new(env::current_exe().expect("it has a path"))
            .args([&format!("confinement::tests::{test}"), "--exact", "--nocapture", "--test-threads=1"])
            .env(ACT, act.to_string())
            .stdin(Stdio::null())
            .output()
            .expect("the child starts");
        (output.status, String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn own_act() -> Option<usize> {
        env::var(ACT).ok()?.parse().ok()
    }

    #[test]
    fn nothing_else_can_be_done() {
        if let Some(act) = own_act() {
            OTHER.set(Some(io::pipe().expect("a pipe").1));
            confine(LIMITS).expect("this kernel has Landlock and seccomp");
            let (_, act) = ACTS[act];
            std::process::exit(if act().is_ok() { DONE } else { 1 });
        }
        for (index, (what, _)) in ACTS.iter().enumerate() {
            let (status, said) = child("nothing_else_can_be_done", index);
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {status} {said}");
        }
    }

    #[test]
    fn it_can_read_and_write_and_has_memory_up_to_its_limit() {
        if own_act().is_some() {
            confine(LIMITS).expect("this kernel has Landlock and seccomp");
            let mut room = Vec::<u8>::new();
            let is_read = io::stdin().read(&mut [0; 16]).is_ok_and(|length| length == 0);
            let has_memory = room.try_reserve_exact(64 << 20).is_ok();
            let has_limit = room.try_reserve_exact(2 << 30).is_err();
            let is_written = io::stdout().write_all(b"written").is_ok() && io::stdout().flush().is_ok();
            std::process::exit(if is_read && has_memory && has_limit && is_written { DONE } else { 1 });
        }
        let (status, said) = child("it_can_read_and_write_and_has_memory_up_to_its_limit", 0);
        assert!(status.code() == Some(DONE) && said.ends_with("written"), "{status} {said}");
    }
}
