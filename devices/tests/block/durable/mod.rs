//! What was flushed is there, whenever the process or the host stops.
//!
//! A driver has requests at random on four queues, many at once. What may be on the disk afterwards is worked
//! out from what it asked for and what was answered ([`history`]).

mod cut;
mod driver;
mod history;
mod kill;

use std::fs;
use std::path::{Path, PathBuf};

use vmm_sys_util::tempdir::TempDir;

use super::qcow2::{check, contents, qemu_img};

/// Sectors of the disk: 8 MiB, which has more tables with small clusters than the library keeps in memory.
pub const SECTORS: u64 = 16 << 10;
pub const SECTOR: usize = 512;

/// What a disk is made of.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Raw,
    /// Options of `qemu-img`, whether it lies over another image, and whether that is compressed.
    Qcow2 {
        options: &'static str,
        over: bool,
        compressed: bool,
    },
}

pub const KINDS: [Kind; 6] = [
    Kind::Raw,
    Kind::Qcow2 { options: "cluster_size=64k", over: false, compressed: false },
    Kind::Qcow2 { options: "cluster_size=64k", over: true, compressed: false },
    Kind::Qcow2 { options: "cluster_size=512", over: false, compressed: false },
    Kind::Qcow2 { options: "cluster_size=512", over: true, compressed: false },
    Kind::Qcow2 { options: "cluster_size=4k", over: false, compressed: true },
];

/// A disk's files in a directory of their own.
pub struct Files {
    directory: TempDir,
    pub kind: Kind,
}

impl Files {
    pub fn new(kind: Kind) -> Self {
        let directory = TempDir::new().unwrap();
        let files = Self { directory, kind };
        let base: Vec<u8> = (0..SECTORS).flat_map(history::at_first).collect();
        fs::write(files.path("base.img"), base).unwrap();
        let (base, disk) = (files.path("base.img"), files.disk());
        let [base, disk] = [&base, &disk].map(|path| path.to_str().unwrap());
        match kind {
            Kind::Raw => drop(fs::copy(base, disk).unwrap()),
            Kind::Qcow2 { options, over: true, .. } => {
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "-F", "raw", "-b", base, disk]);
            }
            Kind::Qcow2 { options, compressed, .. } => {
                let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
                arguments.extend(compressed.then_some("-c"));
                qemu_img(&[&arguments[..], &[base, disk]].concat());
            }
        }
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    /// The disk.
    pub fn disk(&self) -> PathBuf {
        self.path(if matches!(self.kind, Kind::Raw) { "disk.img" } else { "disk.qcow2" })
    }

    /// Nothing is wrong with the disk in `path`, and its contents are these.
    pub fn contents(&self, path: &Path) -> Vec<u8> {
        if matches!(self.kind, Kind::Raw) {
            return fs::read(path).unwrap();
        }
        check(path, true);
        contents(path)
    }
}

/// Numbers that look like chance, the same for the same seed (SplitMix64).
#[derive(Clone)]
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Rounds that a test does: more where the variable of this name says so.
pub fn rounds(few: u64) -> u64 {
    std::env::var("BALLAST_DISK_ROUNDS").map_or(few, |rounds| rounds.parse().unwrap())
}
