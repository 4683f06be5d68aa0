//! What a guest does with its disks.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::mount::MountFlags;

/// How much is read or written at a time.
const PIECE: usize = 64 << 10;

/// `BLKDISCARD` (linux/fs.h): start and length in bytes.
const BLKDISCARD: libc::Ioctl = libc::_IO(0x12, 119);

/// What the word at a place is, for a seed.
fn word(seed: u64, place: u64) -> u64 {
    (seed << 40 ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

fn piece(seed: u64, offset: usize, len: usize) -> Vec<u8> {
    (0..len).step_by(8).flat_map(|at| word(seed, (offset + at) as u64).to_le_bytes()).collect()
}

fn pieces(bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..bytes).step_by(PIECE).map(move |offset| (offset, PIECE.min(bytes - offset)))
}

fn at(name: &str) -> (String, impl Fn(io::Error) -> String) {
    let path = format!("/dev/{name}");
    (path.clone(), move |error| format!("{path}: {error}"))
}

/// Fills the first `bytes` of a disk with the pattern of `seed`, and has it made to last.
pub fn write(name: &str, bytes: usize, seed: u64) -> Result<(), String> {
    let (path, failed) = at(name);
    let file = OpenOptions::new().write(true).open(path).map_err(&failed)?;
    for (offset, len) in pieces(bytes) {
        file.write_all_at(&piece(seed, offset, len), offset as u64).map_err(&failed)?;
    }
    file.sync_all().map_err(&failed)
}

/// Looks whether the pattern is there, with nothing of it in the guest's cache.
pub fn read(name: &str, bytes: usize, seed: u64) -> Result<(), String> {
    let (path, failed) = at(name);
    fs::write("/proc/sys/vm/drop_caches", "1")
        .map_err(|error| format!("/proc/sys/vm/drop_caches: {error}"))?;
    let file = File::open(path).map_err(&failed)?;
    for (offset, len) in pieces(bytes) {
        let mut found = vec![0; len];
        file.read_exact_at(&mut found, offset as u64).map_err(&failed)?;
        if found != piece(seed, offset, len) {
            return Err(format!("/dev/{name} has something else within {len} bytes from {offset} on"));
        }
    }
    Ok(())
}

/// Tells the disk that its first `bytes` are not needed.
pub fn discard(name: &str, bytes: usize) -> Result<(), String> {
    let (path, failed) = at(name);
    let file = OpenOptions::new().write(true).open(path).map_err(&failed)?;
    let range = [0, bytes as u64];
    // SAFETY: the kernel reads two numbers from a valid pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result < 0 { Err(failed(io::Error::last_os_error())) } else { Ok(()) }
}

/// Where a file system of a disk is mounted.
const MOUNTED: &str = "/disk";
/// Files of a directory that is made and removed: more than one block of names.
const MOST_FILES: usize = 200;

/// Copies the files of one kernel in the ext4 of a partition to those of another version, as a package manager leaves
/// them. All of it is on the medium afterwards, some only in the journal: nothing is unmounted.
pub fn install(partition: &str, old: &str, new: &str) -> Result<(), String> {
    let (path, failed) = at(partition);
    let work = || {
        fs::create_dir_all(MOUNTED)?;
        rustix::mount::mount(path.as_str(), MOUNTED, "ext4", MountFlags::empty(), None)?;
        // Blocks that were a directory's are a file's afterwards: the journal has to take them back.
        let directory = format!("{MOUNTED}/removed");
        fs::create_dir(&directory)?;
        for number in 0..MOST_FILES {
            File::create(format!("{directory}/a-file-with-a-long-name-{number}"))?;
        }
        File::open(&directory)?.sync_all()?;
        fs::remove_dir_all(&directory)?;
        for name in ["vmlinuz", "initrd.img"] {
            let copy = format!("{MOUNTED}/boot/{name}-{new}");
            fs::copy(format!("{MOUNTED}/boot/{name}-{old}"), &copy)?;
            File::open(copy)?.sync_all()?;
        }
        File::open(format!("{MOUNTED}/boot"))?.sync_all()
    };
    work().map_err(failed)
}
