//! The host's side of an address: the memory of another process, and where it lies in the machine.
//!
//! Kernel: Documentation/admin-guide/mm/pagemap.rst and filesystems/proc.rst.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use crate::walk::PageSize;

const PAGE: u64 = 4096;
// Bits of an entry of pagemap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const SHARED_FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;
const SOFT_DIRTY: u64 = 1 << 55;
const FRAME: u64 = (1 << 55) - 1;
/// `KPF_THP` of linux/kernel-page-flags.h.
const TRANSPARENT_HUGE: u64 = 1 << 22;

/// Another process's memory can't be looked at.
#[derive(Debug, thiserror::Error)]
#[error(
    "the memory of process {pid} can't be read ({path}: {source}): it has ended, or this is not the user who runs \
     the VM; where kernel.yama.ptrace_scope is not 0, it takes root"
)]
pub struct Error {
    pid: u32,
    path: String,
    source: io::Error,
}

/// Where a page of a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Residence {
    /// Nothing has touched it, or what was there was given back.
    Absent,
    /// In swap.
    Swapped,
    /// In memory.
    Present {
        /// System physical address of the byte asked for; only root learns it.
        system: Option<u64>,
        /// Size of the page that the host has there; `None` where only root could tell.
        page: Option<PageSize>,
        /// No other process maps it.
        exclusive: bool,
        /// It belongs to a file or is shared memory.
        shared_file: bool,
        /// Written to since somebody last asked for that to be noted.
        soft_dirty: bool,
    },
}

/// A process, its memory and its page map.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    memory: File,
    pages: File,
    /// Root only.
    flags: Option<File>,
    /// Read once, when it is wanted: it takes the kernel long for a VM.
    smaps: OnceLock<String>,
}

impl Process {
    /// Opens process `pid` for reading.
    ///
    /// # Errors
    /// Where this user may not.
    pub fn open(pid: u32) -> Result<Self, Error> {
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            File::open(&path).map_err(|source| Error { pid, path, source })
        };
        Ok(Self {
            pid,
            memory: open("mem")?,
            pages: open("pagemap")?,
            flags: File::open("/proc/kpageflags").ok(),
            smaps: OnceLock::new(),
        })
    }

    /// The eight bytes at an address of the process.
    ///
    /// # Errors
    /// Where nothing is mapped there, or the process has ended.
    pub fn word(&self, address: u64) -> Result<u64, Error> {
        word(&self.memory, address).map_err(|source| self.error("mem", source))
    }

    fn error(&self, name: &str, source: io::Error) -> Error {
        Error { pid: self.pid, path: format!("/proc/{}/{name}", self.pid), source }
    }

    /// Where the byte at an address of the process is.
    ///
    /// # Errors
    /// Where the page map can't be read: the process has ended, most likely.
    pub fn residence(&self, address: u64) -> Result<Residence, Error> {
        let entry = self.entry(address).map_err(|source| self.error("pagemap", source))?;
        if entry & PRESENT == 0 {
            return Ok(if entry & SWAPPED == 0 { Residence::Absent } else { Residence::Swapped });
        }
        let frame = entry & FRAME;
        Ok(Residence::Present {
            system: (frame != 0).then_some(frame * PAGE + address % PAGE),
            page: self.page(address, frame),
            exclusive: entry & EXCLUSIVE != 0,
            shared_file: entry & SHARED_FILE != 0,
            soft_dirty: entry & SOFT_DIRTY != 0,
        })
    }

    fn entry(&self, address: u64) -> io::Result<u64> {
        word(&self.pages, address / PAGE * 8)
    }

    fn page(&self, address: u64, frame: u64) -> Option<PageSize> {
        let read = || fs::read_to_string(format!("/proc/{}/smaps", self.pid)).unwrap_or_default();
        match reserved_page(self.smaps.get_or_init(read), address) {
            Some(size) if size == Bytes::gib(1) => return Some(PageSize::Size1G),
            Some(size) if size == Bytes::mib(2) => return Some(PageSize::Size2M),
            _ => {}
        }
        let flags = word(self.flags.as_ref()?, frame.checked_mul(8)?).ok()?;
        if frame == 0 {
            return None;
        }
        // A huge page that the process has mapped in pieces does not lie as its addresses do.
        let within = |number: u64| number % (PageSize::Size2M.bytes() / PAGE);
        let huge = flags & TRANSPARENT_HUGE != 0 && within(frame) == within(address / PAGE);
        Some(if huge { PageSize::Size2M } else { PageSize::Size4K })
    }
}

fn word(file: &File, offset: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(u64::from_le_bytes(bytes))
}

/// `KernelPageSize` of the mapping that holds `address`.
fn reserved_page(smaps: &str, address: u64) -> Option<Bytes> {
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next()?;
        if let Some((start, end)) = first.split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).ok();
            inside = number(start)? <= address && address < number(end)?;
        } else if let (true, Some(size)) = (inside, line.strip_prefix("KernelPageSize:")) {
            return size.trim().strip_suffix(" kB")?.parse().ok().map(Bytes::kib);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_finds_its_own_memory() {
        let value = Box::new(0x1234_5678_9abc_def0_u64);
        let address = (&raw const *value) as u64;
        let process = Process::open(std::process::id()).expect("one's own memory");
        assert_eq!(process.word(address).expect("mapped"), *value);
        let found = process.residence(address).expect("one's own page map");
        let Residence::Present { system, page, .. } = found else { panic!("{found:?}") };
        // Root alone learns both.
        assert_eq!(system.is_some(), page.is_some());
        assert_eq!(system.map_or(address, |s| s) % PAGE, address % PAGE);
        assert!(process.word(8).is_err(), "nothing is mapped there");
    }

    #[test]
    fn page_sizes_are_read_from_smaps() {
        let smaps = "\
7f00000-7f10000 rw-p 00000000 00:00 0 \nSize: 64 kB\nKernelPageSize:        4 kB\nVmFlags: rd wr\n\
7f20000-7f40000 rw-s 00000000 00:0f 1 /memfd:x y (deleted)\nKernelPageSize:     2048 kB\n";
        assert_eq!(reserved_page(smaps, 0x7f0_0000), Some(Bytes::kib(4)));
        assert_eq!(reserved_page(smaps, 0x7f1_0000), None);
        assert_eq!(reserved_page(smaps, 0x7f3_ffff), Some(Bytes::mib(2)));
        assert_eq!(reserved_page("nonsense\n\n-", 0), None);
    }
}
