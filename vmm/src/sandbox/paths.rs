//! The paths that a sandboxed process may still name, where nothing can change them.
//!
//! Of a path a filter of system calls sees only where in memory it lies, and Landlock gives the right to remove
//! files for whole directories, which are those of other VMs as well. So the paths of this VM's own sockets lie
//! in memory that the kernel keeps read-only for good, and the filter knows where. Nor can anything else
//! be put in that place: it lies lower than any address at which the filter lets a mapping be made,
//! changed or taken away.
//!
//! Each lies there as the address of a Unix socket (unix(7)), so that a VM can listen at its own paths again
//! where somebody has removed them, and at no others.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{self, Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Where they lie: above what the kernel keeps free (`vm.mmap_min_addr`), and below where it puts anything.
const START: usize = 1 << 20;

/// x86-64's smallest page. Not asked of rustix, which reads `/proc/self/auxv` for it, and that is closed by now.
const PAGE: usize = 4096;

/// Paths that can't be changed.
#[derive(Debug)]
pub(super) struct Kept {
    /// This VM's own, each with its final zero.
    pub(super) paths: Vec<&'static CStr>,
    /// Sockets of others.
    pub(super) others: Vec<&'static CStr>,
    /// The first address behind them.
    pub(super) end: usize,
}

/// Set once, by the one VM of this process.
static KEPT: OnceLock<Kept> = OnceLock::new();

/// A path as a system call takes it, whatever the current directory.
///
/// # Errors
/// It is empty, has a zero in it, or there is no current directory.
pub(crate) fn absolute(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path::absolute(path)?.into_os_string().into_vec())?)
}

/// The path in the place where the sandbox lets it be named; itself where there is no sandbox.
pub(crate) fn kept(path: &CStr) -> &CStr {
    KEPT.get().and_then(|kept| kept.paths.iter().find(|kept| **kept == path)).copied().unwrap_or(path)
}

/// What stands before each path: the family of a Unix socket's address.
const FAMILY: [u8; 2] = (libc::AF_UNIX as u16).to_ne_bytes();

/// Where the address of the socket at a kept path begins, and how long it is.
pub(super) fn address_of(path: &CStr) -> (usize, usize) {
    (path.as_ptr().addr() - FAMILY.len(), FAMILY.len() + path.to_bytes_with_nul().len())
}

/// Binds `socket` at `path`, in the way in which the sandbox lets it be done.
///
/// # Errors
/// As bind(2); [`Errno::INVAL`] for a path that is too long.
pub(crate) fn bind(socket: &OwnedFd, path: &CStr) -> Result<(), Errno> {
    let kept = KEPT.get().and_then(|kept| kept.paths.iter().find(|kept| **kept == path));
    with_address(path, kept.copied(), |address, length| {
        // SAFETY: so many bytes of an address lie there, which the kernel reads.
        unsafe { libc::bind(socket.as_raw_fd(), address, length) }
    })
}

/// A stream to the socket at `path`, whose reads and writes don't wait, in the way in which the sandbox lets it be
/// made.
///
/// # Errors
/// As connect(2).
pub(crate) fn connect(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let kept = KEPT.get().and_then(|kept| kept.others.iter().find(|kept| **kept == path));
    with_address(path, kept.copied(), |address, length| {
        // SAFETY: so many bytes of an address lie there, which the kernel reads.
        unsafe { libc::connect(socket.as_raw_fd(), address, length) }
    })?;
    Ok(socket)
}

/// Calls with the address of the socket at `path`, in the place where it is kept if it is.
fn with_address(
    path: &CStr,
    kept: Option<&'static CStr>,
    call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> libc::c_int,
) -> Result<(), Errno> {
    let mut own = Vec::new();
    let (address, length) = match kept {
        Some(kept) => address_of(kept),
        None => {
            own.extend_from_slice(&FAMILY);
            own.extend_from_slice(path.to_bytes_with_nul());
            (own.as_ptr().expose_provenance(), own.len())
        }
    };
    let address = ptr::with_exposed_provenance::<libc::sockaddr>(address);
    // The kernel refuses one that is too long.
    if call(address, length as libc::socklen_t) == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    }
}

/// Keeps this VM's own `paths`, and those of `others` that it connects to, from now on.
///
/// # Errors
/// The kernel refuses, or there are some already.
pub(super) fn keep(paths: &[PathBuf], others: &[PathBuf]) -> io::Result<&'static Kept> {
    let count = paths.len();
    let paths: Vec<CString> =
        paths.iter().chain(others).map(|path| absolute(path)).collect::<io::Result<_>>()?;
    let text: Vec<u8> =
        paths.iter().flat_map(|path| FAMILY.iter().chain(path.as_bytes_with_nul())).copied().collect();
    let mut kept = Kept { paths: Vec::new(), others: Vec::new(), end: START };
    if !text.is_empty() {
        let mut rest = map(&text)?;
        kept.end = START + text.len().next_multiple_of(PAGE);
        while let Some(Ok(path)) = rest.get(FAMILY.len()..).map(CStr::from_bytes_until_nul) {
            kept.paths.push(path);
            rest = rest.get(address_of(path).1..).unwrap_or_default();
        }
        kept.others = kept.paths.split_off(count.min(kept.paths.len()));
    }
    KEPT.set(kept).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    KEPT.get().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Puts `text` at [`START`] for good.
fn map(text: &[u8]) -> io::Result<&'static [u8]> {
    let file = rustix::fs::memfd_create(c"paths", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::io::write(&file, text)?;
    // The mapping below can't be made writable with it (memfd_create(2)), and once the file is closed nobody
    // can make another.
    rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::SEAL)?;
    let (at, len) = (ptr::without_provenance_mut(START), text.len());
    let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE;
    // SAFETY: a new mapping, which takes no other's place.
    let mapped = NonNull::new(unsafe { mmap(at, len, ProtFlags::READ, flags, &file, 0) }?);
    let mapped = mapped.filter(|mapped| mapped.addr().get() == START).ok_or(io::ErrorKind::AddrInUse)?;
    mapped.as_ptr().expose_provenance();
    // SAFETY: `len` bytes that were just mapped, are never unmapped, and which nobody can change.
    Ok(unsafe { std::slice::from_raw_parts(mapped.cast::<u8>().as_ptr(), len) })
}
