//! Where a disk's bytes come from.

use std::io;
use std::rc::Rc;

/// A disk's bytes.
pub trait Source {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// As the host's; `UnexpectedEof` where the disk has less.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// A disk in memory.
impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let there = start.and_then(|start| self.get(start..)?.get(..bytes.len()));
        bytes.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A piece of a disk.
#[derive(Clone)]
pub struct View {
    source: Rc<dyn Source>,
    start: u64,
    len: u64,
}

impl View {
    /// All of a disk.
    pub fn whole(source: Rc<dyn Source>) -> Self {
        let len = source.size();
        Self { source, start: 0, len }
    }

    /// A piece of this one, as far as it lies in it.
    pub fn part(&self, start: u64, len: u64) -> Self {
        let start = start.min(self.len);
        let source = Rc::clone(&self.source);
        Self { source, start: self.start.saturating_add(start), len: len.min(self.len.saturating_sub(start)) }
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// As [`Source::read_at`].
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match offset.checked_add(bytes.len() as u64) {
            Some(end) if end <= self.len => self.source.read_at(self.start.saturating_add(offset), bytes),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Up to `len` bytes from `offset` on: fewer where it ends.
    ///
    /// # Errors
    /// As [`Source::read_at`].
    pub fn bytes(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let there = self.len.saturating_sub(offset).min(len as u64);
        let mut bytes = vec![0; there as usize];
        if there > 0 {
            self.read_at(offset, &mut bytes)?;
        }
        Ok(bytes)
    }
}
