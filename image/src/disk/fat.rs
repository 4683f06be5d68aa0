//! FAT, by the library fatfs: the EFI system partition, on which some distributions keep their kernels.

use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};

use fatfs::{FileSystem, FsOptions};

use super::SearchError;
use super::files::{Files, MOST_NAMES};
use super::source::View;

/// A file system.
pub struct FatFiles {
    fs: FileSystem<Disk>,
    place: String,
}

impl FatFiles {
    /// Opens the file system in `view`, which errors call `place`.
    ///
    /// # Errors
    /// Why it can't be read, in words that follow the name of its partition.
    pub fn open(view: &View, place: &str) -> Result<Self, String> {
        let disk = Disk { view: view.clone(), position: 0 };
        let options = FsOptions::new().update_accessed_date(false);
        let fs = FileSystem::new(disk, options).map_err(|error| format!("that can't be read ({error})"))?;
        Ok(Self { fs, place: place.to_owned() })
    }

    fn damaged(&self, error: &io::Error) -> SearchError {
        SearchError::Damaged { place: self.place.clone(), why: error.to_string() }
    }

    fn file(&self, path: &str) -> Result<Option<fatfs::File<'_, Disk>>, SearchError> {
        match self.fs.root_dir().open_file(path.trim_start_matches('/')) {
            Ok(file) => Ok(Some(file)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(self.damaged(&error)),
        }
    }
}

/// Whether it says that there is no such file, or one of another kind.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Other | ErrorKind::InvalidInput)
}

impl Files for FatFiles {
    fn names(&self, directory: &str) -> Result<Vec<String>, SearchError> {
        let root = self.fs.root_dir();
        let directory = match directory.trim_matches('/') {
            "" => root,
            path => match root.open_dir(path) {
                Ok(directory) => directory,
                Err(error) if is_missing(&error) => return Ok(Vec::new()),
                Err(error) => return Err(self.damaged(&error)),
            },
        };
        let name = |entry: io::Result<fatfs::DirEntry<'_, Disk>>| match entry {
            Ok(entry) => Ok(entry.file_name()),
            Err(error) => Err(self.damaged(&error)),
        };
        directory.iter().take(MOST_NAMES).map(name).collect()
    }

    fn size(&self, path: &str) -> Result<Option<u64>, SearchError> {
        let Some(mut file) = self.file(path)? else { return Ok(None) };
        file.seek(SeekFrom::End(0)).map(Some).map_err(|error| self.damaged(&error))
    }

    fn resolve(&self, path: &str) -> Result<String, SearchError> {
        Ok(path.to_owned())
    }

    fn read(
        &self,
        path: &str,
        take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>,
    ) -> Result<(), SearchError> {
        let Some(mut file) = self.file(path)? else { return Ok(()) };
        let mut left = self.size(path)?.unwrap_or(0);
        let mut piece = vec![0; 64 << 10];
        while left > 0 {
            let count = file.read(&mut piece).map_err(|error| self.damaged(&error))?;
            if count == 0 {
                return Err(self.damaged(&io::Error::other(format!("{path} ends early"))));
            }
            left = left.saturating_sub(count as u64);
            take(piece.get(..count).unwrap_or_default())?;
        }
        Ok(())
    }
}

/// The library's way to the disk, by which nothing is written.
struct Disk {
    view: View,
    position: u64,
}

impl Read for Disk {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let there = self.view.size().saturating_sub(self.position).min(bytes.len() as u64);
        let bytes = bytes.get_mut(..there as usize).unwrap_or_default();
        if !bytes.is_empty() {
            self.view.read_at(self.position, bytes)?;
        }
        self.position = self.position.saturating_add(there);
        Ok(bytes.len())
    }
}

impl Write for Disk {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Disk {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.view.size().checked_add_signed(by),
        };
        self.position = position.ok_or(ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
