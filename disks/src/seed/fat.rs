//! A FAT file system in memory.

use std::fs::File;
use std::io::{self, Seek, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The label by which cloud-init finds the disk.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// The least that a disk has: FAT needs some of it.
const LEAST: u64 = 1 << 20;
/// What the tables take at most, and what files lose by whole clusters.
const SLACK: u64 = 256 << 10;

/// A disk with `files` in its root directory: a memfd that can't be changed any more.
pub fn disk(files: &[(&str, &String)]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut disk = File::from(memfd_create(c"cloud-init", flags)?);
    let data: u64 = files.iter().map(|(_, text)| text.len() as u64).sum();
    disk.set_len(data.saturating_add(SLACK).max(LEAST).next_multiple_of(64 << 10))?;
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new().volume_label(LABEL))?;
    disk.rewind()?;
    let file_system = FileSystem::new(&mut disk, FsOptions::new())?;
    for (name, text) in files {
        let mut file = file_system.root_dir().create_file(name)?;
        file.write_all(text.as_bytes())?;
        file.flush()?;
    }
    file_system.unmount()?;
    fcntl_add_seals(&disk, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(disk)
}
