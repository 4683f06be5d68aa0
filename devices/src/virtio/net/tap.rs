//! A tap of the host: a network interface whose other end is a file (`Documentation/networking/tuntap.rst`).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::{HEADER, NetError};
use crate::virtio::queue::IoVectors;

/// Makes and opens interfaces.
const DEVICE: &str = "/dev/net/tun";

/// What a driver may leave to the host with such an interface, or take from it.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// A tap that takes and gives virtio's header in front of each frame.
pub struct Tap {
    file: OwnedFd,
    name: String,
    mtu: Option<u16>,
}

impl Tap {
    /// Opens the interface `name`, which must be there: a tap for one user of it at a time.
    ///
    /// # Errors
    /// [`NetError`] says what is missing and who can help.
    pub fn open(name: &str) -> Result<Self, NetError> {
        request(name).ok_or_else(|| NetError::Name(name.to_owned()))?;
        // Who may do so would make a new one of the name, with no cable in it.
        if interface(name, libc::SIOCGIFINDEX).map_err(failed(name, "looked for"))?.is_none() {
            return Err(NetError::NoTap(name.to_owned()));
        }
        let (file, name) = take(name)?.map_err(|source| NetError::refused(name, source))?;
        Self::ready(file, name)
    }

    /// A tap, or a macvtap, that whoever started this process has opened as descriptor `number`.
    ///
    /// # Errors
    /// [`NetError::Descriptor`] says what is wrong with it.
    ///
    /// # Safety
    /// The descriptor belongs to nobody else in this process.
    pub unsafe fn from_descriptor(number: RawFd) -> Result<Self, NetError> {
        let wrong = |what: String| NetError::Descriptor { number, what };
        // SAFETY: asks for flags of any number.
        if number <= libc::STDERR_FILENO || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(wrong("there is none of this number that could be a tap".to_owned()));
        }
        // SAFETY: it is open, and the caller leaves it to us.
        let file = unsafe { OwnedFd::from_raw_fd(number) };
        // SAFETY: a request of zeros is one.
        let mut request: libc::ifreq = unsafe { zeroed() };
        // SAFETY: the kernel writes one request.
        let result = unsafe { libc::ioctl(number, libc::TUNGETIFF, &raw mut request) };
        result_of(result).map_err(|error| wrong(format!("it is no tap ({error})")))?;
        // SAFETY: the kernel has set the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            return Err(wrong(
                "it is a tun, which carries no Ethernet frames: open it with IFF_TAP".to_owned(),
            ));
        }
        if flags & libc::IFF_VNET_HDR == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(wrong(
                "it was opened without IFF_VNET_HDR and IFF_NO_PI: open it with both".to_owned(),
            ));
        }
        // SAFETY: sets flags of an open file.
        let set = unsafe {
            let flags = libc::fcntl(number, libc::F_GETFL);
            libc::fcntl(number, libc::F_SETFL, flags | libc::O_NONBLOCK).min(libc::fcntl(
                number,
                libc::F_SETFD,
                libc::FD_CLOEXEC,
            ))
        };
        result_of(set).map_err(|error| wrong(error.to_string()))?;
        Self::ready(file, name_of(&request))
    }

    pub(super) fn ready(file: OwnedFd, name: String) -> Result<Self, NetError> {
        let size = HEADER as libc::c_int;
        // SAFETY: the kernel reads one number.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        result_of(result).map_err(failed(&name, "told the length of virtio's header"))?;
        // One that was opened by others, or in another network namespace, may not be seen from here.
        let seen = |what| interface(&name, what).unwrap_or(None);
        let mtu = seen(libc::SIOCGIFMTU).and_then(|mtu| u16::try_from(mtu).ok());
        if seen(libc::SIOCGIFFLAGS).is_some_and(|flags| flags & libc::IFF_UP == 0) {
            tracing::warn!("the tap {name} is down, and takes no frames: ip link set {name} up");
        }
        let tap = Self { file, name, mtu };
        tap.offload(0).map_err(failed(tap.name(), "told which frames the guest takes"))?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The largest packet that the interface carries, as far as it can be known.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Features of the device that it is good for.
    pub fn features(&self) -> u64 {
        OFFLOADS
    }

    /// Tells the kernel which unfinished frames the driver takes that has agreed to `features`; zero for none.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn offload(&self, features: u64) -> io::Result<()> {
        let has = |feature: u32| features & 1 << feature != 0;
        let mut flags = 0;
        // The rest goes with it (virtio 1.2, section 5.1.3.1).
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            flags |= libc::TUN_F_CSUM;
            let (four, six) = (has(VIRTIO_NET_F_GUEST_TSO4), has(VIRTIO_NET_F_GUEST_TSO6));
            flags |= if four { libc::TUN_F_TSO4 } else { 0 } | if six { libc::TUN_F_TSO6 } else { 0 };
            if (four || six) && has(VIRTIO_NET_F_GUEST_ECN) {
                flags |= libc::TUN_F_TSO_ECN;
            }
        }
        // SAFETY: the argument is a number.
        result_of(unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags))
        })
    }

    /// Reads one frame: its header, then as much of it as there is room for in guest memory, the rest into
    /// `tail`. Returns the length of the frame without the header.
    ///
    /// # Errors
    /// As `readv(2)`; [`io::ErrorKind::WouldBlock`] where there is none.
    pub fn receive(
        &self,
        header: &mut [u8; HEADER],
        frame: &mut IoVectors,
        tail: &mut [u8],
    ) -> io::Result<usize> {
        let read = frame.read_message(self.file.as_fd(), header, tail)?;
        read.checked_sub(HEADER).ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    /// Writes one frame.
    ///
    /// # Errors
    /// As `writev(2)`.
    pub fn send(&self, header: &[u8; HEADER], frame: &mut IoVectors) -> io::Result<()> {
        frame.write_message(self.file.as_fd(), header).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `map_err` with what was to be done with the interface.
pub(super) fn failed(name: &str, what: &'static str) -> impl FnOnce(io::Error) -> NetError {
    let name = name.to_owned();
    move |source| NetError::Tap { name, what, source }
}

pub(super) fn result_of(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens a file for the tap `name`, or for a new one where there is none; a number of the kernel's choice stands for a
/// `%d` in its name. The outer error is that there are no taps at all.
pub(super) fn take(name: &str) -> Result<io::Result<(OwnedFd, String)>, NetError> {
    let mut request = named(name).ok_or_else(|| NetError::Name(name.to_owned()))?;
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let file: OwnedFd = options.open(DEVICE).map_err(NetError::NoTun)?.into();
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one request.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Ok(result_of(result).map(|()| (file, name_of(&request))))
}

/// The name in a request.
fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0);
    String::from_utf8(bytes.collect()).unwrap_or_default()
}

/// A request about the interface of this name, where it can be one.
pub(super) fn request(name: &str) -> Option<libc::ifreq> {
    named(name).filter(|_| !name.contains(['/', ':', '%', ' ']))
}

fn named(name: &str) -> Option<libc::ifreq> {
    let bytes = CString::new(name).ok()?;
    if name.is_empty() || bytes.as_bytes_with_nul().len() > libc::IFNAMSIZ {
        return None;
    }
    // SAFETY: a request of zeros is one.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(bytes.as_bytes()) {
        *place = *byte as libc::c_char;
    }
    Some(request)
}

/// What requests about interfaces are made with.
pub(super) fn socket() -> io::Result<OwnedFd> {
    // SAFETY: makes a descriptor.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    result_of(socket)?;
    // SAFETY: it was just made, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// What the kernel says of an interface; none where there is no such.
pub(super) fn interface(name: &str, what: libc::Ioctl) -> io::Result<Option<libc::c_int>> {
    let Some(mut request) = request(name) else { return Ok(None) };
    let socket = socket()?;
    // SAFETY: the kernel reads and writes one request.
    match result_of(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) }) {
        Ok(()) if what == libc::SIOCGIFFLAGS => {
            // SAFETY: the kernel has set it.
            Ok(Some(i32::from(unsafe { request.ifr_ifru.ifru_flags })))
        }
        // SAFETY: as above.
        Ok(()) => Ok(Some(unsafe { request.ifr_ifru.ifru_mtu })),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}
