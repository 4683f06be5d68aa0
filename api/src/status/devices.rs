//! What a VM has beside memory: its console, disks and network cards.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// One network card of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    /// What it is called in its VM.
    pub id: String,
    /// Its address.
    pub mac: String,
    /// Where its cable ends, as the user said.
    pub backend: String,
    /// The IP address that the guest is given, where this side gives it one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Ports of the host that lead into the guest, as the user said.
    #[serde(default)]
    pub forwards: Vec<String>,
    /// Whether there is somebody at the other end.
    pub up: bool,
    /// Frames to the guest since the VM started.
    pub received: NetCount,
    /// Frames from it.
    pub sent: NetCount,
}

/// What passed a network card one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCount {
    /// Frames that passed.
    pub frames: u64,
    /// Bytes in them.
    pub bytes: Bytes,
    /// Frames that were lost here: there was no room for them, or the host refused them.
    pub dropped: u64,
    /// Times that frames were held back by the card's limits.
    #[serde(default)]
    pub limited: u64,
    /// Milliseconds of that.
    #[serde(default)]
    pub limited_ms: u64,
}

/// One disk of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// What it is called in its VM.
    pub id: String,
    /// Bytes of it.
    pub size: Bytes,
    /// The guest may only read it.
    pub read_only: bool,
    /// Reads since the VM started.
    pub reads: DiskCount,
    /// Writes.
    pub writes: DiskCount,
    /// Discards and writes of zeros.
    pub cleared: DiskCount,
    /// Flushes.
    pub flushes: u64,
    /// Times that the host could not do what the guest asked for.
    pub errors: u64,
    /// Requests that waited for the disk's limits.
    pub limited: u64,
    /// Milliseconds in which some request waited for them.
    pub limited_ms: u64,
    /// Why requests wait until the VM is resumed: what the host said, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCount {
    /// Requests that were done.
    pub operations: u64,
    /// Bytes in them.
    pub bytes: Bytes,
}

/// `POST /disks/resize`: a disk that is to become larger while its guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// Which, by its id.
    pub disk: String,
    /// How large it is to be.
    pub size: Bytes,
}

/// The protocol in which `GET /vm/console` goes on: the guest's output one way, the client's input the other.
pub const CONSOLE_PROTOCOL: &str = "ballast-console";

/// The protocol in which `GET /vm/vsock` goes on: bytes of a stream, both ways.
pub const VSOCK_PROTOCOL: &str = "ballast-vsock";

/// What has become of a VM's console output since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleStatus {
    /// What its reader has taken.
    pub written: Bytes,
    /// What waits for a reader, or for one who is slow.
    pub waiting: Bytes,
    /// What nobody gets: there was no room for it any more, or no reader to come.
    pub lost: Bytes,
}
