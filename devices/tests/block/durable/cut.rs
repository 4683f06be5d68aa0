//! A host that loses its power.
//!
//! Under the real device and the real library lies a file that notes each write and each barrier. What a medium
//! may hold after a power cut follows from that: all that was written before the last barrier began, and of
//! the rest anything, in pieces of a sector.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use devices::virtio::block::qcow2::Qcow2Disk;
use devices::virtio::block::raw::Cache;
use imago::file::File as ImageFile;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use parking_lot::Mutex;

use super::super::qcow2::options;
use super::driver::Driver;
use super::history::{Event, History};
use super::{Chance, Files, KINDS, Kind, SECTOR, rounds};

#[derive(Clone, Debug)]
enum Note {
    /// A write begins: its place and its bytes.
    Write(u64, Vec<u8>),
    /// The write of this note is over.
    Written(usize),
    BarrierBegins,
    /// The barrier that this note began is over.
    Barrier(usize),
    Driver(Event),
}

type Notes = Arc<Mutex<Vec<Note>>>;

fn note(notes: &Notes, note: Note) -> usize {
    let mut notes = notes.lock();
    notes.push(note);
    notes.len() - 1
}

/// A file of which all is noted.
#[derive(Debug)]
struct Noted {
    file: ImageFile,
    notes: Notes,
    helper: CommonStorageHelper,
    /// Barriers do nothing: what a host without any order would leave.
    lies: bool,
}

impl Noted {
    fn write(&self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        let begun = note(&self.notes, Note::Write(offset, bytes.clone()));
        let done = self.file.write(&bytes[..], offset);
        note(&self.notes, Note::Written(begun));
        done
    }
}

impl fmt::Display for Noted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl Storage for Noted {
    // As past the page cache.
    fn mem_align(&self) -> usize {
        4096
    }
    fn req_align(&self) -> usize {
        SECTOR
    }
    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }
    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn get_filename(&self) -> Option<PathBuf> {
        self.file.get_filename()
    }
    unsafe fn pure_readv(&self, vector: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.file.pure_readv(vector, offset) }
    }
    unsafe fn pure_writev(&self, vector: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; vector.len() as usize];
        vector.copy_into_slice(&mut bytes);
        self.write(offset, bytes)
    }
    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write(offset, vec![0; length as usize])
    }
    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write(offset, vec![0; length as usize])
    }
    unsafe fn pure_discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }
    fn sync(&self) -> io::Result<()> {
        let begun = note(&self.notes, Note::BarrierBegins);
        // The file itself outlives this process: the notes are the medium.
        if !self.lies {
            note(&self.notes, Note::Barrier(begun));
        }
        Ok(())
    }
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }
    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(size, mode)
    }
}

/// What a medium that held `before` may hold when the power goes after these notes.
fn cut(before: &[u8], notes: &[Note], chance: &mut Chance) -> Vec<u8> {
    let barrier =
        notes.iter().filter_map(|note| if let Note::Barrier(begun) = note { Some(*begun) } else { None });
    let barrier = barrier.max().unwrap_or(0);
    let mut written: Vec<(usize, usize)> = Vec::new();
    let mut begun: Vec<usize> = Vec::new();
    for (place, note) in notes.iter().enumerate() {
        match note {
            Note::Write(..) => begun.push(place),
            Note::Written(write) => {
                begun.retain(|other| other != write);
                written.push((*write, place));
            }
            _ => {}
        }
    }
    written.extend(begun.into_iter().map(|write| (write, usize::MAX)));
    let mut medium = before.to_vec();
    // How much of what has no barrier is there: nothing, all, or any part.
    let share = [0, 1, 8, 15, 16][chance.below(5) as usize];
    for (write, over) in written {
        let Note::Write(offset, bytes) = &notes[write] else { panic!("{write}") };
        let is_whole = over < barrier;
        let here = is_whole || chance.below(16) < share;
        let is_torn = !is_whole && chance.below(4) == 0;
        for (index, piece) in bytes.chunks(SECTOR).enumerate() {
            if here && !(is_torn && chance.below(2) == 0) {
                let start = *offset as usize + index * SECTOR;
                let end = start + piece.len();
                medium.resize(medium.len().max(end), 0);
                medium[start..end].copy_from_slice(piece);
            }
        }
    }
    medium
}

/// Has requests done, and looks at what power cuts would leave. Returns the flushes before them.
fn round(kind: Kind, seed: u64, cuts: u64, lies: bool) -> usize {
    let files = Files::new(kind);
    let path = files.disk();
    let before = fs::read(&path).unwrap();
    let notes = Notes::default();
    let file = |file| Noted { file, notes: notes.clone(), helper: CommonStorageHelper::default(), lies };
    let disk = Qcow2Disk::open_in(&path, options(Cache::Buffered), &file).unwrap();
    let mut driver = Driver::new(Arc::new(disk));
    driver.run(seed, 250, |event| {
        note(&notes, Note::Driver(event));
    });
    drop(driver);
    let notes = std::mem::take(&mut *notes.lock());
    let mut chance = Chance(seed);
    let after = files.path("after.qcow2");
    (0..cuts)
        .map(|_| {
            let notes = &notes[..chance.below(notes.len() as u64) as usize];
            fs::write(&after, cut(&before, notes, &mut chance)).unwrap();
            let events = notes
                .iter()
                .filter_map(|note| if let Note::Driver(event) = note { Some(*event) } else { None });
            History::new(seed, events).check(&files.contents(&after))
        })
        .sum()
}

fn cut_all(rounds: u64, cuts: u64) {
    for kind in KINDS.into_iter().filter(|kind| !matches!(kind, Kind::Raw)) {
        let flushes: usize = (0..rounds).map(|seed| round(kind, seed, cuts, false)).sum();
        assert!(flushes > 0, "nothing was flushed in {kind:?}");
        println!("{kind:?}: {} power cuts after {flushes} flushes", rounds * cuts);
    }
}

#[test]
fn what_was_flushed_outlives_a_power_cut() {
    cut_all(rounds(2), 6);
}

#[test]
#[ignore = "a few minutes: 1,000 power cuts"]
fn what_was_flushed_outlives_a_thousand_power_cuts() {
    cut_all(rounds(40), 5);
}

/// The model finds what it is made to find.
#[test]
fn a_medium_without_barriers_loses_what_was_flushed() {
    let lost = std::panic::catch_unwind(|| {
        for seed in 0..4 {
            round(KINDS[3], seed, 16, true);
        }
    });
    assert!(lost.is_err());
}

/// A block that is read, changed and written as a whole takes back what others write to it meanwhile.
#[test]
fn entries_of_the_first_table_are_written_without_what_lies_behind_it() {
    let files = Files::new(KINDS[4]);
    let notes = Notes::default();
    let file =
        |file| Noted { file, notes: notes.clone(), helper: CommonStorageHelper::default(), lies: false };
    let head = fs::read(files.disk()).unwrap();
    let word = |at: usize| u64::from(u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
    let start = u64::from_be_bytes(head[40..48].try_into().unwrap());
    let end: u64 = start + 8 * word(36);
    let disk = Qcow2Disk::open_in(&files.disk(), options(Cache::Buffered), &file).unwrap();
    Driver::new(Arc::new(disk)).run(1, 250, |_| ());
    let mut entries = 0;
    for note in &*notes.lock() {
        let Note::Write(offset, bytes) = note else { continue };
        if *offset < end && offset + bytes.len() as u64 > start {
            assert!(offset + bytes.len() as u64 <= end, "{offset:#x} {:#x}", bytes.len());
            entries += 1;
        }
    }
    assert!(entries > 0, "no table was added");
}
