//! How a VM ends, and what the process says and returns then.

use std::fmt;

use devices::platform::GuestEnd;

/// ballast itself failed: a file, a system call, a setting.
pub const FAILED: u8 = 1;
/// The command line could not be understood.
pub const USAGE: u8 = 2;
/// This host's KVM can't run stock guests.
pub const HOST_CANNOT: u8 = 3;

/// How a VM that ran has ended. Its text is the sentence for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest switched itself off (ACPI S5).
    PoweredOff,
    /// Someone outside stopped it: a signal, or the API.
    Stopped,
    /// The guest asked for a reset. The VM does not start over by itself.
    Reboot,
    /// The guest's kernel panicked, as its pvpanic driver says.
    Panicked,
    /// The guest could not handle a fault, and its processor gave up.
    TripleFault,
    /// KVM could not run a vCPU on.
    VcpuFailed(String),
    /// Ctrl-A x on the console.
    ConsoleQuit,
    /// A part of ballast itself could not go on.
    Failed(String),
}

impl From<GuestEnd> for Exit {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::PowerOff => Self::PoweredOff,
            GuestEnd::Reset => Self::Reboot,
            GuestEnd::Panic => Self::Panicked,
        }
    }
}

impl Exit {
    /// The process's exit code.
    pub const fn code(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Stopped => 0,
            Self::Reboot => 10,
            Self::Panicked => 11,
            Self::TripleFault => 12,
            Self::VcpuFailed(_) => 13,
            Self::ConsoleQuit => 14,
            Self::Failed(_) => FAILED,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("The guest powered off."),
            Self::Stopped => f.write_str("The VM was stopped on request."),
            Self::Reboot => f.write_str(
                "The guest asked for a reboot. A panic looks the same when the guest has no pvpanic driver loaded.",
            ),
            Self::Panicked => f.write_str("The guest's kernel panicked."),
            Self::TripleFault => {
                f.write_str("The guest triple-faulted: it met a fault that it had no handler for.")
            }
            Self::VcpuFailed(why) => write!(f, "KVM could not run the guest on: {why}"),
            Self::ConsoleQuit => f.write_str("The VM was killed from the console (Ctrl-A x)."),
            Self::Failed(why) => write!(f, "The VM was ended, as a part of ballast failed: {why}"),
        }
    }
}
