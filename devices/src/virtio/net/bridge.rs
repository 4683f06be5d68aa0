//! A tap in a bridge of the host, which is there as long as its NIC.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::mac::Mac;
use super::tap::{self, Tap};
use super::{MTUS, NetError};

/// What the taps are called: the kernel puts a number in the place of `%d`.
const NAMES: &str = "ballast%d";

/// `SIOCBRADDIF` (`linux/sockios.h`), which libc does not have.
const ADD_TO_BRIDGE: libc::Ioctl = 0x89a2;

impl Tap {
    /// Makes a tap for the NIC of address `mac`, and puts it into the bridge. It goes with its file, however this
    /// process ends.
    ///
    /// # Errors
    /// [`NetError`] says what is missing and who can help.
    pub fn in_bridge(bridge: &str, mac: Mac) -> Result<Self, NetError> {
        tap::request(bridge).ok_or_else(|| NetError::Name(bridge.to_owned()))?;
        let looked_for = tap::failed(bridge, "looked for");
        let mtu = tap::interface(bridge, libc::SIOCGIFMTU).map_err(looked_for)?;
        let mtu = mtu.ok_or_else(|| NetError::NoBridge(bridge.to_owned()))?;
        let refused = |name: &str, what| {
            let (name, bridge) = (name.to_owned(), bridge.to_owned());
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::EPERM) => NetError::NoRight { bridge },
                // Other interfaces take no members.
                Some(libc::EOPNOTSUPP | libc::ENODEV) => NetError::NoBridge(bridge),
                _ => NetError::Tap { name, what, source },
            }
        };
        let (file, name) = tap::take(NAMES)?.map_err(refused(NAMES, "made"))?;
        let socket = tap::socket().map_err(refused(&name, "looked for"))?;
        // A bridge takes over the lowest address of its members, unless it was given one: this is none of those.
        let [_, rest @ ..] = mac.bytes();
        let address = [0xfe].into_iter().chain(rest);
        let mut request = tap::request(&name).ok_or_else(|| NetError::Name(name.clone()))?;
        // SAFETY: a request of zeros is one; its fields are plain numbers.
        unsafe {
            request.ifr_ifru.ifru_hwaddr = std::mem::zeroed();
            request.ifr_ifru.ifru_hwaddr.sa_family = libc::ARPHRD_ETHER;
            for (place, byte) in request.ifr_ifru.ifru_hwaddr.sa_data.iter_mut().zip(address) {
                *place = byte as libc::c_char;
            }
        }
        ask(&socket, libc::SIOCSIFHWADDR, &mut request).map_err(refused(&name, "given an address"))?;
        request.ifr_ifru.ifru_mtu = mtu.min(i32::from(*MTUS.end()));
        ask(&socket, libc::SIOCSIFMTU, &mut request).map_err(refused(&name, "told its largest packet"))?;
        ask(&socket, libc::SIOCGIFINDEX, &mut request).map_err(refused(&name, "looked for"))?;
        // SAFETY: the kernel has set it.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        let mut joins = tap::request(bridge).ok_or_else(|| NetError::Name(bridge.to_owned()))?;
        joins.ifr_ifru.ifru_ifindex = index;
        ask(&socket, ADD_TO_BRIDGE, &mut joins).map_err(refused(&name, "put into the bridge"))?;
        ask(&socket, libc::SIOCGIFFLAGS, &mut request).map_err(refused(&name, "looked at"))?;
        // SAFETY: the kernel has set them.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        ask(&socket, libc::SIOCSIFFLAGS, &mut request).map_err(refused(&name, "switched on"))?;
        Self::ready(file, name)
    }
}

/// Has the kernel do something with an interface.
fn ask(socket: &OwnedFd, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the kernel reads and writes one request.
    tap::result_of(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut *request) })
}
