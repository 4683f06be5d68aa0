//! What a VM's process can still do once its guest runs, should the guest ever get hold of it.
//!
//! Two walls, both for every thread and for good. Landlock (`landlock(7)`) leaves of the file
//! system what a running VM opens: its own entry in `/proc`, and the names of its sockets to
//! remove. Seccomp (`seccomp(2)`) leaves the system calls that a running VM makes. Everything
//! else was opened, mapped and started before.
//!
//! A call that is not on the list fails with `EPERM` instead of killing the process: that
//! stops an intruder just as well, and a call that a library makes one day costs an error, not
//! a guest.

mod calls;

use std::path::{Path, PathBuf};

use devices::sandbox::{Call, SandboxNeeds};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

/// The newest set of rights that is asked for; older kernels give what they know (Linux 6.7: TCP too).
const LANDLOCK: ABI = ABI::V4;

/// Why the walls could not be put up. The guest has not run then.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Landlock is there and failed.
    #[error("this process could not be kept from the file system: {0}; `--no-sandbox` runs it without")]
    Files(#[from] landlock::RulesetError),
    /// A directory that was there a moment ago.
    #[error("{} can't be kept reachable: {source}; `--no-sandbox` runs without a sandbox", .path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: landlock::PathFdError,
    },
    /// No seccomp, or a filter that the kernel refuses.
    #[error("system calls could not be restricted: {0}; `--no-sandbox` runs without a sandbox")]
    Calls(#[from] seccompiler::Error),
    /// A filter that can't be made.
    #[error("the list of system calls is no filter: {0}")]
    List(#[from] seccompiler::BackendError),
}

/// The directory that a path lies in.
pub fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        Some(_) => PathBuf::from("."),
        None => path.to_owned(),
    }
}

/// Closes the file system and TCP for this thread and those it starts from now on, but for
/// `/proc/self` to read and what is needed beside.
///
/// # Errors
/// [`SandboxError::Files`] and [`SandboxError::Path`]. A kernel without Landlock is none:
/// there, ownership and modes are the only wall for files.
pub fn close_files(needs: &SandboxNeeds) -> Result<(), SandboxError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .create()?;
    let own = [PathBuf::from("/proc/self")];
    let read = own.iter().chain(&needs.read).map(|path| (path, AccessFs::ReadFile));
    let remove = needs.remove.iter().map(|path| (path, AccessFs::RemoveFile));
    for (path, access) in read.chain(remove) {
        let opened = PathFd::new(path).map_err(|source| SandboxError::Path { path: path.clone(), source })?;
        ruleset = ruleset.add_rule(PathBeneath::new(opened, access))?;
    }
    let status = ruleset.restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::debug!("this kernel has no Landlock: files are kept from the guest by seccomp alone");
    }
    Ok(())
}

/// Leaves every thread of this process only the system calls of a running VM, and those of its devices.
///
/// # Errors
/// [`SandboxError::Calls`] where the kernel has no seccomp.
pub fn close_calls(devices: &[Call]) -> Result<(), SandboxError> {
    let program = calls::filter(devices)?;
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}
