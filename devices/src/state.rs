//! Device state as data: what a device knows, to be written down and read back by another process.
//!
//! Each device and the transport have a state of their own, which begins with its version.
//! What is read back may come from anybody: it passes the checks that the guest would have to.

use std::fmt;
use std::io;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// Why state can't be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The host gave no eventfd.
    #[error("the device can't be made: {0}")]
    Host(#[from] io::Error),
    /// This kind of device has not learnt it.
    #[error("the state of a virtio device of type {device} can't be saved by this version of ballast")]
    NotSaved {
        /// The device's number (virtio 1.2, section 5).
        device: u32,
    },
    /// It has requests that are part of no state.
    #[error(
        "in {device} requests wait for the host, or for its limits: let the VM run on before it is saved"
    )]
    Waits {
        /// Whose.
        device: &'static str,
    },
    /// It is not what this version writes.
    #[error("the saved state of {device} can't be read: {what}")]
    Unreadable {
        /// Whose.
        device: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// It was saved from another kind of device.
    #[error("the saved state is of a virtio device of type {found}, and this one is of type {expected}")]
    OtherDevice {
        /// The number in the state.
        found: u32,
        /// The number of the device.
        expected: u32,
    },
    /// It was saved from a device on another transport.
    #[error("the saved state is of a virtio device on {found}, and this one is on {expected}")]
    OtherTransport {
        /// The transport in the state.
        found: &'static str,
        /// The transport of the device.
        expected: &'static str,
    },
    /// It was saved from a device with other queues.
    #[error("the saved state has {found} queues, and the device has {expected}")]
    OtherQueues {
        /// Queues in the state.
        found: usize,
        /// Queues of the device.
        expected: usize,
    },
    /// No driver could have made such a queue.
    #[error(
        "queue {index} of the saved state is none that a driver could have set up in this guest's memory: is \
         it the state of another guest?"
    )]
    Queue {
        /// Which.
        index: usize,
    },
    /// The features could not have been agreed on.
    #[error("the saved state has features {features:#x}, and the device offers {offered:#x}")]
    Features {
        /// In the state.
        features: u64,
        /// The device's.
        offered: u64,
    },
    /// A register holds what it never can.
    #[error("{register} of the saved state is {value:#x}, which it never can be")]
    Register {
        /// What it is called.
        register: &'static str,
        /// In the state.
        value: u32,
    },
}

/// The version of a state: the first field of each. Reading another one than `N` is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version<const N: u16>;

impl<const N: u16> Serialize for Version<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(N)
    }
}

impl<'de, const N: u16> Deserialize<'de> for Version<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found = u16::deserialize(deserializer)?;
        if found == N { Ok(Self) } else { Err(D::Error::custom(OtherVersion { found, known: N })) }
    }
}

struct OtherVersion {
    found: u16,
    known: u16,
}

impl fmt::Display for OtherVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { found, known } = self;
        write!(
            f,
            "it is of version {found}, and this ballast knows version {known}: restore it with the ballast that \
             saved it"
        )
    }
}

/// `state` as data without a type.
///
/// # Errors
/// [`StateError::Unreadable`]; not for the plain structs that devices have.
pub fn to_value(state: &impl Serialize) -> Result<Value, StateError> {
    serde_json::to_value(state)
        .map_err(|error| StateError::Unreadable { device: "the device", what: error.to_string() })
}

/// Data without a type as version `N` of the state of `device`. The version is looked at before
/// all else, as nothing is known of how another one looks.
///
/// # Errors
/// [`StateError::Unreadable`] says what is wrong with it.
pub fn from_value<T: DeserializeOwned, const N: u16>(
    device: &'static str,
    state: Value,
) -> Result<T, StateError> {
    let unreadable = |error: serde_json::Error| StateError::Unreadable { device, what: error.to_string() };
    if let Some(version) = state.get("version") {
        let _: Version<N> = Version::deserialize(version).map_err(unreadable)?;
    }
    serde_json::from_value(state).map_err(unreadable)
}
