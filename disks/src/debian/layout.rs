//! What lies where on the disk.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use api::units::Bytes;
use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition::Partition;
use gpt::partition_types::LINUX_ROOT_X64;
use rustix::fs::{SeekFrom, seek};

use super::identity::Identity;
use super::{BuildError, host, open_to_all};
use crate::tool::{Stop, ToolError};

const SECTOR: u64 = 512;
/// Where the root partition begins; what is before it and behind it belongs to the tables of partitions.
pub const ROOT_START: Bytes = Bytes::mib(1);
/// How much is copied at a time.
const PIECE: usize = 1 << 20;

/// Bytes of the root partition on a disk of `size`.
pub fn root_size(size: Bytes) -> Bytes {
    let whole = Bytes(size.0 / Bytes::mib(1).0 * Bytes::mib(1).0);
    whole.saturating_sub(ROOT_START).saturating_sub(Bytes::mib(1))
}

/// Makes a file of `size` with nothing in it, that programs of another user may write.
pub fn make_room(path: &Path, size: Bytes) -> Result<(), BuildError> {
    let file = File::create_new(path);
    let made = file.and_then(|file| file.set_len(size.0));
    made.map_err(host(format!("{} can't be made", path.display())))?;
    open_to_all(path, 0o666)
}

/// Writes a GPT with the root partition alone.
pub fn write_table(path: &Path, identity: &Identity) -> Result<(), BuildError> {
    let failed = |error: &dyn ToString| BuildError::Table(error.to_string());
    let mut disk = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(host(format!("{} can't be opened", path.display())))?;
    let size = disk.metadata().map_err(host("the image can't be looked at".to_owned()))?.len();
    let sectors = (size / SECTOR).saturating_sub(1);
    let protective = ProtectiveMBR::with_lb_size(u32::try_from(sectors).unwrap_or(u32::MAX));
    protective.overwrite_lba0(&mut disk).map_err(|error| failed(&error))?;
    let config = GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(disk, Some(identity.disk)).map_err(|error| failed(&error))?;
    let first = ROOT_START.0 / SECTOR;
    let root = Partition {
        part_type_guid: LINUX_ROOT_X64,
        part_guid: identity.partition,
        first_lba: first,
        last_lba: first.saturating_add(root_size(Bytes(size)).0 / SECTOR).saturating_sub(1),
        flags: 0,
        name: "root".to_owned(),
    };
    table.update_partitions(BTreeMap::from([(1, root)])).map_err(|error| failed(&error))?;
    table.write().map_err(|error| failed(&error))?;
    Ok(())
}

/// Copies a file to an empty one, and leaves out what is not written in it.
pub fn copy_sparse(from: &Path, to: &File, stop: &Stop) -> Result<(), BuildError> {
    let failed = |source| host("the image can't be written".to_owned())(source);
    let size = fs::metadata(from).map_err(failed)?.len();
    let source = File::open(from).map_err(failed)?;
    to.set_len(size).map_err(failed)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let data = match seek(&source, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(failed(error.into())),
        };
        let end = seek(&source, SeekFrom::Hole(data)).map_err(|error| failed(error.into()))?;
        at = data;
        while at < end {
            if stop.load(Ordering::Relaxed) {
                return Err(ToolError::Stopped.into());
            }
            let len = usize::try_from(end.saturating_sub(at)).unwrap_or(PIECE).min(PIECE);
            let piece = piece.get_mut(..len).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
            source.read_exact_at(piece, at).map_err(failed)?;
            to.write_all_at(piece, at).map_err(failed)?;
            at = at.saturating_add(len as u64);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use uuid::Uuid;

    #[test]
    fn the_table_says_where_the_root_is_and_is_the_same_each_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str| {
            let path = directory.path().join(name);
            make_room(&path, Bytes::mib(64)).expect("made");
            let id = Uuid::from_u128;
            let identity =
                Identity { packages: 0, disk: id(1), partition: id(2), root: id(3), spread: id(4) };
            write_table(&path, &identity).expect("written");
            path
        };
        let (first, second) = (write("first"), write("second"));
        assert_eq!(fs::read(&first).expect("read"), fs::read(second).expect("read"));
        let table = GptConfig::new().open(&first).expect("a table");
        let root = &table.partitions()[&1];
        assert_eq!((root.first_lba, root.last_lba), (2048, 2048 + 62 * 2048 - 1));
        assert_eq!(root.part_guid, Uuid::from_u128(2));
        assert_eq!(*table.guid(), Uuid::from_u128(1));
        // Both tables are whole, and outside of the partition.
        assert!(table.primary_header().is_ok() && table.backup_header().is_ok());
        assert!(root.last_lba < table.header().last_usable);
    }

    #[test]
    fn holes_stay_holes() {
        let directory = tempfile::tempdir().expect("a directory");
        let from = directory.path().join("from");
        let file = File::create(&from).expect("made");
        file.set_len(64 << 20).expect("long");
        file.write_all_at(&[7; 5000], 3 << 20).expect("written");
        file.write_all_at(&[8; 100], (64 << 20) - 100).expect("written");
        let to = tempfile::tempfile().expect("a file");
        copy_sparse(&from, &to, &Stop::new(false)).expect("copied");
        let mut bytes = vec![0; 64 << 20];
        to.read_exact_at(&mut bytes, 0).expect("read");
        assert!(bytes == fs::read(&from).expect("read"), "another file");
        assert!(to.metadata().expect("there").blocks() < 1 << 10);
        assert!(copy_sparse(&from, &to, &Stop::new(true)).is_err());
    }
}
