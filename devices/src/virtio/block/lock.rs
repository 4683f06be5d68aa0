//! Locks on disk files that other programs understand.
//!
//! QEMU and its tools lock single bytes of an image by `F_OFD_SETLK`: one byte for each thing that a process
//! does to the image, and one for each that it does not let others do (QEMU's documentation, "Image locking").
//! Two programs that do what the other does not allow find each other that way, on one host and over NFS.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The byte of the first thing that is done.
const DONE: i64 = 100;
/// The byte of the first thing that others must not do.
const DENIED: i64 = 200;

// What can be done to an image, by the number of its byte.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What others must not do.
const DENY: [i64; 2] = [WRITE, RESIZE];

/// Takes the locks of a process that reads the file, and writes it unless `read_only`. Others may only read it
/// meanwhile. They go when the last descriptor of this opening of the file is closed. Returns false where
/// another process does what is denied, or denies what is done.
///
/// # Errors
/// The file system has no locks.
pub fn lock(file: &File, read_only: bool) -> io::Result<bool> {
    // One's own first, then a look at others': of two that start at once, at least one sees the other.
    hold(file, read_only)?;
    let others =
        done(read_only).iter().map(|thing| DENIED + thing).chain(DENY.iter().map(|thing| DONE + thing));
    for byte in others {
        if is_held_by_other(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Has another opening of a file keep the locks that this process has already by [`lock`]: they go with the last.
///
/// # Errors
/// The file system has no locks.
pub fn hold(file: &File, read_only: bool) -> io::Result<()> {
    let mut bytes =
        done(read_only).iter().map(|thing| DONE + thing).chain(DENY.iter().map(|thing| DENIED + thing));
    bytes.try_for_each(|byte| share(file, byte))
}

fn done(read_only: bool) -> &'static [i64] {
    if read_only { &[READ] } else { &[READ, WRITE] }
}

fn record(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: a struct of plain numbers, for which zero is a value.
    let mut record: libc::flock = unsafe { std::mem::zeroed() };
    // Both are small constants.
    record.l_type = kind as libc::c_short;
    record.l_whence = libc::SEEK_SET as libc::c_short;
    record.l_start = byte;
    record.l_len = 1;
    record
}

fn share(file: &File, byte: i64) -> io::Result<()> {
    let record = record(libc::F_RDLCK, byte);
    // SAFETY: the kernel reads one flock from a valid pointer.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const record) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut record = record(libc::F_WRLCK, byte);
    // SAFETY: the kernel reads and writes one flock at a valid pointer.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut record) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(libc::c_int::from(record.l_type) != libc::F_UNLCK)
    }
}
