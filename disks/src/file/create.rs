//! New disks.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::units::Bytes;
use devices::virtio::block::raw::open_locked;
use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, StorageOpenOptions};

use super::{FileError, Format, Info, io_of, whole};

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct Create {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk; `None` is as many as what lies behind it has.
    pub size: Option<Bytes>,
    /// What shows where it has nothing of its own.
    pub backing: Option<(PathBuf, Format)>,
    /// A file of that name may be replaced, where nobody uses it.
    pub force: bool,
}

impl Create {
    /// Makes it: whole, or not at all.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn run(&self) -> Result<Info, FileError> {
        let failed = io_of(&self.path);
        // Held until the new one is in its place.
        let _replaced = match self.path.symlink_metadata() {
            Ok(_) if !self.force => return Err(FileError::Exists(self.path.clone())),
            Ok(there) if !there.is_file() => return Err(FileError::NoFile(self.path.clone())),
            Ok(_) => Some(open_locked(&self.path, false)?),
            Err(_) => None,
        };
        let (size, backing) = self.size_and_backing()?;
        let name = self.path.file_name().unwrap_or(OsStr::new("disk")).to_string_lossy();
        let new = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory_of(&self.path))
            .map_err(&failed)?;
        match self.format {
            Format::Raw => new.as_file().set_len(size.0).map_err(&failed)?,
            Format::Qcow2 => make_qcow2(new.as_file(), new.path(), size, backing).map_err(&failed)?,
        }
        new.as_file().sync_all().map_err(&failed)?;
        let placed = if self.force { new.persist(&self.path) } else { new.persist_noclobber(&self.path) };
        placed.map_err(|error| failed(error.error))?;
        // The name, too, is to last; the file itself is there by now.
        let _ = File::open(directory_of(&self.path)).and_then(|directory| directory.sync_all());
        Info::of(&self.path, self.format)
    }

    fn size_and_backing(&self) -> Result<(Bytes, Option<(String, Format)>), FileError> {
        let Some((behind, format)) = &self.backing else {
            return Ok((whole(self.size.ok_or(FileError::NoSize)?)?, None));
        };
        if self.format != Format::Qcow2 {
            return Err(FileError::RawBacking);
        }
        // Whoever writes it would change this one too: readers alone may have it.
        let _locked = open_locked(behind, true)?;
        let below = Info::of(behind, *format)?.size;
        let size = whole(self.size.unwrap_or(below))?;
        if size < below {
            return Err(FileError::SmallerThanBacking { size, behind: below });
        }
        let name = name_from(&self.path, behind)?;
        Ok((size, Some((name, *format))))
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What an image at `above` calls the file `behind`: its name alone where both lie in one directory, so that they can
/// be moved together, and the whole path otherwise.
fn name_from(above: &Path, behind: &Path) -> Result<String, FileError> {
    let failed = io_of(behind);
    let directory = directory_of(above).canonicalize().map_err(io_of(above))?;
    let own = directory_of(behind).canonicalize().map_err(&failed)?;
    let name = behind.file_name().ok_or_else(|| FileError::NoFile(behind.to_owned()))?;
    let path = if own == directory { PathBuf::from(name) } else { own.join(name) };
    let text = path.into_os_string().into_string().map_err(|_| FileError::BackingName)?;
    let text = if text.contains(':') && !text.contains('/') { format!("./{text}") } else { text };
    if text.len() > 1023 { Err(FileError::BackingName) } else { Ok(text) }
}

fn make_qcow2(
    file: &File,
    path: &Path,
    size: Bytes,
    backing: Option<(String, Format)>,
) -> std::io::Result<()> {
    let options = StorageOpenOptions::new().filename(path).write(true);
    let storage = Storage::from_open_file(file.try_clone()?, options)?;
    let mut builder = Qcow2::<Storage, Arc<FormatAccess<Storage>>>::create_builder(storage).size(size.0);
    if let Some((name, format)) = backing {
        builder = builder.backing(name, format.name().to_owned());
    }
    builder.create()
}
