//! What a VM's process can still do once its guest runs, should the guest ever get hold of it.
//!
//! Two walls, both for every thread and for good. Landlock (`landlock(7)`) closes the file system, but for what
//! the devices of this VM say that they need, and the names of its sockets, to remove and to make again. Seccomp (`seccomp(2)`)
//! leaves the system calls that a running VM makes. Everything else was opened, mapped and started before.
//! Where one of the two is not to be had, no guest runs.
//!
//! A call that is not on the list fails with `EPERM`, and its number is told on standard error (see
//! `refused`). It does not end the process: an error stops an intruder just as well, and a call that a library
//! makes one day must not cost a guest.

mod calls;
mod paths;
mod refused;

use std::io;
use std::path::{Path, PathBuf};

use devices::sandbox::SandboxNeeds;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus,
};

pub(crate) use paths::{absolute, bind, connect, kept};

/// Rights to files that a kernel must know: all of the first Landlock, of Linux 5.13. What later ones added is
/// to move, to cut off and to control files, for which seccomp leaves no call.
const LEAST: ABI = ABI::V1;

/// The newest set of rights that is asked for; older kernels give what they know (Linux 6.7: TCP too, for which
/// seccomp leaves no call either).
const NEWEST: ABI = ABI::V4;

/// Arenas of the allocator at most. If it was free to choose, it would look up how many processors there are, in a
/// file.
const ARENAS: libc::c_int = 1;

/// Why the walls could not be put up. The guest has not run then.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No Landlock, or not all of it that matters.
    #[error(
        "this host's kernel can't keep a VM's process from files (Landlock: {0}): use Linux 5.13 or later, with \
         `landlock` in the list in /sys/kernel/security/lsm (`lsm=` on the kernel's command line); or run without a \
         sandbox: --no-sandbox"
    )]
    Files(String),
    /// A file or directory that was there a moment ago.
    #[error("{} can't be kept reachable: {source}; `--no-sandbox` runs without a sandbox", .path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: landlock::PathFdError,
    },
    /// The kernel refuses what goes with the filter.
    #[error("system calls could not be restricted: {0}; `--no-sandbox` runs without a sandbox")]
    Host(#[from] io::Error),
    /// No seccomp, or a filter that the kernel refuses.
    #[error("system calls could not be restricted: {0}; `--no-sandbox` runs without a sandbox")]
    Calls(#[from] seccompiler::Error),
    /// A filter that can't be made.
    #[error("the list of system calls is no filter: {0}")]
    List(#[from] seccompiler::BackendError),
}

impl From<landlock::RulesetError> for SandboxError {
    fn from(error: landlock::RulesetError) -> Self {
        Self::Files(error.to_string())
    }
}

/// The directory that a path lies in.
fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        Some(_) => PathBuf::from("."),
        None => path.to_owned(),
    }
}

/// The directory that a directory lies in, unless that is the root: then itself.
fn parent_of(directory: &Path) -> PathBuf {
    let whole = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    match whole.parent() {
        Some(parent) if parent.parent().is_some() => parent.to_owned(),
        Some(_) | None => whole,
    }
}

/// Whether this kernel can close files to a process.
///
/// # Errors
/// As [`close_files`].
pub fn check() -> Result<(), SandboxError> {
    closed().map(drop)
}

/// What closes everything.
fn closed() -> Result<RulesetCreated, SandboxError> {
    Ok(Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(LEAST))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .create()?)
}

/// Closes the file system and TCP for this thread and those it starts from now on, but for what is needed.
///
/// # Errors
/// [`SandboxError::Files`] where the kernel has no Landlock, or can't hold all rights to files;
/// [`SandboxError::Path`].
pub fn close_files(needs: &SandboxNeeds) -> Result<(), SandboxError> {
    let mut ruleset = closed()?;
    let read = needs.read.iter().map(|path| (path.clone(), AccessFs::ReadFile));
    let remove = needs.remove.iter().map(|path| (directory_of(path), AccessFs::RemoveFile));
    // Also where the whole directory was removed and is there again, which is another one to Landlock.
    let make = needs.remove.iter().map(|path| (parent_of(&directory_of(path)), AccessFs::MakeSock));
    for (path, access) in read.chain(remove).chain(make) {
        let opened = PathFd::new(&path).map_err(|source| SandboxError::Path { path, source })?;
        ruleset = ruleset.add_rule(PathBeneath::new(opened, access))?;
    }
    match ruleset.restrict_self()?.ruleset {
        RulesetStatus::NotEnforced => Err(SandboxError::Files("it is not enforced".to_owned())),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

/// Leaves every thread of this process only the system calls of a running VM, and those of its devices.
///
/// # Errors
/// [`SandboxError::Calls`] where the kernel has no seccomp; [`SandboxError::Host`].
pub fn close_calls(needs: &SandboxNeeds) -> Result<(), SandboxError> {
    let kept = paths::keep(&needs.remove, &needs.connect)?;
    let program = calls::filter(needs, kept)?;
    refused::tell_of()?;
    // SAFETY: a number for the allocator, at any time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}
