//! Larger disks.

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use api::units::Bytes;
use devices::virtio::block::qcow2::Head;
use devices::virtio::block::raw::open_locked;
use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::{FileError, Format, Info, io_of, whole};

/// How large a disk is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So large.
    To(Bytes),
    /// Larger by so much.
    By(Bytes),
}

/// `SIZE`, or `+SIZE`.
impl FromStr for NewSize {
    type Err = FileError;

    fn from_str(text: &str) -> Result<Self, FileError> {
        let (more, size) = text.strip_prefix('+').map_or((false, text), |size| (true, size));
        let size: Bytes = size.parse().map_err(|_| FileError::Size(text.to_owned()))?;
        Ok(if more { Self::By(size) } else { Self::To(size) })
    }
}

/// Makes a disk larger that nobody uses. What is added reads as zeros.
///
/// # Errors
/// [`FileError`]; the disk has not changed then.
pub fn resize(path: &Path, format: Format, size: NewSize) -> Result<Info, FileError> {
    let failed = io_of(path);
    let file = open_locked(path, false)?;
    if !file.metadata().map_err(&failed)?.is_file() {
        return Err(FileError::NoFile(path.to_owned()));
    }
    // Held by this very process.
    let is = Info { in_use: false, ..Info::of(path, format)? };
    let asked = whole(match size {
        NewSize::To(size) => size,
        NewSize::By(more) => is.size.saturating_add(whole(more)?),
    })?;
    if asked < is.size {
        return Err(FileError::Smaller { is: is.size, asked });
    }
    if asked == is.size {
        return Ok(is);
    }
    match format {
        Format::Raw => file.set_len(asked.0).map_err(&failed)?,
        Format::Qcow2 => {
            let head = Head::read(&file);
            let head = head.map_err(|source| FileError::Head { path: path.to_owned(), source })?;
            // Where the disk behind it is longer, its end would show in what is added.
            let added = match (&head.backing, head.version) {
                (None, _) => PreallocateMode::None,
                (Some(_), 3) => PreallocateMode::Zero,
                (Some(_), _) => return Err(FileError::OldOverlay(path.to_owned())),
            };
            let options = StorageOpenOptions::new().filename(path).write(true);
            let grow = || {
                let storage = Storage::from_open_file(file.try_clone()?, options)?;
                let image = Qcow2::<Storage, Arc<FormatAccess<Storage>>>::builder(storage)
                    .write(true)
                    .backing(None)
                    .data_file(None)
                    .open(DenyImplicitOpenGate::default())?;
                let image = FormatAccess::new(image);
                image.resize_grow(asked.0, added)?;
                image.flush()
            };
            grow().map_err(&failed)?;
        }
    }
    file.sync_all().map_err(&failed)?;
    Ok(Info { in_use: false, ..Info::of(path, format)? })
}
