use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

/// A kernel or an initramfs: a file of the host, or what was taken from a guest's disk.
#[derive(Debug)]
pub struct BootFile {
    name: PathBuf,
    taken: Option<File>,
}

impl BootFile {
    /// The host's file at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { name: path.into(), taken: None }
    }

    /// What was taken from elsewhere, by the name that users know it by.
    pub fn taken(name: impl Into<PathBuf>, file: File) -> Self {
        Self { name: name.into(), taken: Some(file) }
    }

    /// What users know it by.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.taken.is_some() || self.name.is_file()
    }

    /// Opens it, at its begin. One reader reads it at a time.
    ///
    /// # Errors
    /// The host's.
    pub fn open(&self) -> io::Result<File> {
        let Some(taken) = &self.taken else { return File::open(&self.name) };
        let mut file = taken.try_clone()?;
        file.rewind()?;
        Ok(file)
    }
}
