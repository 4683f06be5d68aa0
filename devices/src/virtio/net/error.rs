//! Why a NIC has no network.

use std::io;
use std::os::fd::RawFd;

/// Why a backend can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not an interface's name.
    #[error("`{0}` is no name of a tap: use 1 to 15 characters without spaces, `/`, `:` and `%`")]
    Name(String),
    /// There is no such interface.
    #[error(
        "there is no tap `{0}`: make it as root with `ip tuntap add dev {0} mode tap user $USER` (your user) and \
         `ip link set {0} up`"
    )]
    NoTap(String),
    /// The device that opens taps.
    #[error(
        "/dev/net/tun can't be opened ({0}): if it is missing, load the module `tun` (modprobe tun); if you may not \
         open it, root can say `chmod 0666 /dev/net/tun`, which is as it usually is"
    )]
    NoTun(io::Error),
    /// The interface is not this user's.
    #[error(
        "the tap `{0}` is another user's, and this process lacks the capability CAP_NET_ADMIN: as root, make it for \
         your user: `ip tuntap add dev {0} mode tap user $USER`"
    )]
    NotYours(String),
    /// There is no such bridge.
    #[error(
        "there is no bridge `{0}`: make it as root with `ip link add {0} type bridge` and `ip link set {0} up`, or name \
         one of those that `ip link show type bridge` lists"
    )]
    NoBridge(String),
    /// Taps and bridges are root's.
    #[error(
        "this process lacks the capability CAP_NET_ADMIN, which it takes to put a tap into the bridge `{bridge}`: run \
         ballast as root, or use --net tap=NAME with a tap that root has put there for your user, or --net user"
    )]
    NoRight {
        /// Into which it was to go.
        bridge: String,
    },
    /// Somebody has it.
    #[error("the tap `{0}` is in use: another VM or process has it open; each NIC needs a tap of its own")]
    InUse(String),
    /// Something else has the name, or it was made in another way.
    #[error(
        "`{0}` is no tap that one process can use: `ip -d link show {0}` must say `tun type tap` without \
         `multi_queue`"
    )]
    NotATap(String),
    /// The kernel refuses.
    #[error("the tap `{name}` can't be {what}: {source}")]
    Tap {
        /// Its name.
        name: String,
        /// What it should be.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// What was handed over is of no use.
    #[error("descriptor {number} can't be a network: {what}")]
    Descriptor {
        /// Which.
        number: RawFd,
        /// What is wrong with it.
        what: String,
    },
}

impl NetError {
    /// Why the interface `name` can't be taken.
    pub(super) fn refused(name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM) => Self::NotYours(name),
            Some(libc::EBUSY) => Self::InUse(name),
            Some(libc::EINVAL) => Self::NotATap(name),
            _ => Self::Tap { name, what: "taken", source },
        }
    }
}
