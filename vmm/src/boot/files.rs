//! Which kernel a VM boots: the one that the user named, or its first disk's own.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::virtio::block::disk::{Disk, DiskError};
use devices::virtio::queue::IoVectors;
use image::BootFile;
use image::disk::source::Source;
use image::disk::{Finder, Found, SearchError};
use tracing::subscriber::{NoSubscriber, with_default};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::builder::open_disk;
use crate::config::{Device, DiskOptions, VmConfig, behind_words};

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootFilesError {
    /// No kernel and no disk.
    #[error("there is nothing to boot: name a kernel (--kernel FILE), or a disk that has one (--disk FILE)")]
    Nothing,
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// No kernel was found on it.
    #[error("the disk {} can't be booted: {why}", disk.display())]
    Search {
        /// The disk.
        disk: PathBuf,
        /// Why.
        why: SearchError,
    },
}

/// What a VM boots.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: BootFile,
    /// The initramfs.
    pub initrd: Option<BootFile>,
    /// Where the disk's root file system has the driver with which this kernel plugs memory.
    pub memory_driver: Option<PathBuf>,
    /// What the disk says for the kernel's command line.
    words: Option<String>,
}

impl BootFiles {
    /// What `kernel` and `initrd` name. Where there is no `kernel`, what `finder` finds on `disk`; an `initrd` stands
    /// in for that of the disk.
    ///
    /// # Errors
    /// [`BootFilesError`].
    pub fn find(
        kernel: Option<&Path>,
        initrd: Option<&Path>,
        disk: Option<&DiskOptions>,
        finder: Option<&Finder>,
    ) -> Result<Self, BootFilesError> {
        let initrd = initrd.map(BootFile::at);
        if let Some(kernel) = kernel {
            return Ok(Self { kernel: BootFile::at(kernel), initrd, memory_driver: None, words: None });
        }
        let (disk, finder) = disk.zip(finder).ok_or(BootFilesError::Nothing)?;
        let Found { plan, kernel, initrd: found } = search(disk, finder)?;
        tracing::info!(
            "{} boots {} from {}, found by {}",
            disk.path.display(),
            plan.kernel,
            plan.place,
            plan.by
        );
        let name = |path: &str| PathBuf::from(format!("{}:{path}", disk.path.display()));
        let found = found.map(|file| BootFile::taken(name(&plan.initrd.join("+")), file));
        Ok(Self {
            kernel: BootFile::taken(name(&plan.kernel), kernel),
            initrd: initrd.or(found),
            memory_driver: plan.memory_driver.as_deref().map(name),
            words: Some(plan.cmdline),
        })
    }

    /// What a configuration says.
    ///
    /// # Errors
    /// [`BootFilesError`].
    pub fn of(config: &VmConfig) -> Result<Self, BootFilesError> {
        let disk = config.devices.iter().find_map(|device| match &device.device {
            Device::Disk(options) => Some(options),
            _ => None,
        });
        Self::find(config.kernel.as_deref(), config.initrd.as_deref(), disk, config.finder.as_ref())
    }

    /// The user's command line, behind what the disk says.
    pub fn cmdline(&self, users: &str) -> String {
        self.words.as_deref().map_or_else(|| users.to_owned(), |words| behind_words(words, users))
    }
}

/// What a disk is booted with. Nothing is written to it, and it is not held.
///
/// # Errors
/// [`BootFilesError`].
pub fn search(options: &DiskOptions, finder: &Finder) -> Result<Found, BootFilesError> {
    let cache = Some(options.cache());
    let options = DiskOptions { readonly: true, cache, ..options.clone() };
    // What there is to warn of is said when the VM's device opens it.
    let disk = with_default(NoSubscriber::default(), || open_disk(&options))?;
    let failed = |why| BootFilesError::Search { disk: options.path.clone(), why };
    let source = OpenDisk::new(disk).map_err(|error| failed(SearchError::Memory(error)))?;
    finder.find(&source).map_err(failed)
}

/// Bytes that are read at once.
const ROOM: usize = 1 << 20;
/// What places on disks are multiples of, so that reads go past the host's page cache.
const ALIGNMENT: u64 = 4096;

/// A disk that is read as a file is.
struct OpenDisk {
    disk: Arc<dyn Disk>,
    /// Where the disk's reads go.
    room: Arc<GuestMemoryMmap>,
    vectors: RefCell<IoVectors>,
}

impl OpenDisk {
    fn new(disk: Arc<dyn Disk>) -> io::Result<Self> {
        let room = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ROOM)]).map_err(io::Error::other)?;
        let room = Arc::new(room);
        Ok(Self { disk, vectors: RefCell::new(IoVectors::new(Arc::clone(&room))), room })
    }

    /// Reads a piece that fits into the room with what makes it aligned.
    fn read_piece(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = offset - offset % ALIGNMENT;
        let end = offset.saturating_add(bytes.len() as u64).next_multiple_of(ALIGNMENT).min(self.disk.size());
        let len = usize::try_from(end.saturating_sub(start)).map_err(io::Error::other)?;
        let mut vectors = self.vectors.borrow_mut();
        vectors.clear();
        if !vectors.push(GuestAddress(0), len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.disk.read(&mut vectors, start)?;
        self.room.read_slice(bytes, GuestAddress(offset - start)).map_err(io::Error::other)
    }
}

impl Source for OpenDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.disk.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut offset = offset;
        for piece in bytes.chunks_mut(ROOM - 2 * ALIGNMENT as usize) {
            self.read_piece(offset, piece)?;
            offset = offset.saturating_add(piece.len() as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn without_kernel_and_disk_there_is_nothing_to_boot() {
        let error = BootFiles::find(None, None, None, None).expect_err("nothing is there").to_string();
        assert!(error.contains("--kernel") && error.contains("--disk"), "{error}");
    }

    #[test]
    fn a_disk_is_read_at_any_place() {
        // No whole number of pages, and longer than the room that it is read through.
        let contents: Vec<u8> = (0..(3 << 20) + 512_u32).map(|place| (place / 3 % 251) as u8).collect();
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&contents).expect("written");
        for cache in ["direct", "buffered"] {
            let spec = format!("{},cache={cache}", file.path().display());
            let options: DiskOptions = spec.parse().expect("a disk");
            let disk = OpenDisk::new(open_disk(&options).expect("it opens")).expect("there is room");
            assert_eq!(disk.size(), contents.len() as u64);
            let last = contents.len() - 1;
            for (offset, len) in [
                (0, 512),
                (1, 1),
                (4095, 2),
                (513, 2 << 20),
                (0, contents.len()),
                (last, 1),
                (last - 700, 700),
            ] {
                let mut bytes = vec![0; len];
                disk.read_at(offset as u64, &mut bytes).expect("it can be read");
                assert!(bytes == contents[offset..][..len], "{len} bytes from {offset} on");
            }
            for (offset, len) in [(last as u64, 2), (u64::MAX, 1), (last as u64 + 1, 1)] {
                let error = disk.read_at(offset, &mut vec![0; len]).expect_err("it ends before");
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }
}
