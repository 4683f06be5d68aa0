//! What a device needs of the host while its guest runs, beyond what every VM's process does anyway. The
//! sandbox around that process is the sum of what the devices of its VM say.
//!
//! What a device has opened before the guest runs stays open, and needs no word here.

use std::path::PathBuf;

/// A system call that a device makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number (`libc::SYS_*`).
    pub number: libc::c_long,
    /// With which argument; `None` is with any.
    pub argument: Option<Argument>,
}

/// One argument of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Which, from 0 on.
    pub index: u8,
    /// Its value, of which the kernel looks at the lower 32 bits.
    pub value: u64,
}

impl Call {
    /// The call, whatever its arguments.
    pub const fn any(number: libc::c_long) -> Self {
        Self { number, argument: None }
    }

    /// `ioctl(2)` with one request.
    pub const fn ioctl(request: u64) -> Self {
        Self { number: libc::SYS_ioctl, argument: Some(Argument { index: 1, value: request }) }
    }
}

/// What a device needs of the sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxNeeds {
    /// Files that it opens for reading, and directories in which it opens any.
    pub read: Vec<PathBuf>,
    /// Its sockets, which it removes at the end, and makes again where somebody else has removed them.
    pub remove: Vec<PathBuf>,
    /// Sockets of others that it connects to.
    pub connect: Vec<PathBuf>,
    /// System calls.
    pub calls: Vec<Call>,
}

impl SandboxNeeds {
    /// These calls and no files.
    pub fn calls(calls: &[Call]) -> Self {
        Self { calls: calls.to_vec(), ..Self::default() }
    }

    /// Adds what another device needs.
    pub fn add(&mut self, other: Self) {
        self.read.extend(other.read);
        self.remove.extend(other.remove);
        self.connect.extend(other.connect);
        self.calls.extend(other.calls);
    }
}
