//! Standard output, and files that hold results.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::Serialize;

use crate::failure::Failure;

/// Writes `text` as it is.
///
/// # Errors
/// A [`Failure`] that says why, or says nothing where the reader has gone.
pub fn text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes `value` as JSON with a line end.
///
/// # Errors
/// As [`text`].
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut encoded = serde_json::to_string_pretty(value).map_err(Failure::new)?;
    encoded.push('\n');
    text(&encoded)
}

/// Writes `contents` to the file that a user named, all of it or nothing: what was there stays till then.
///
/// # Errors
/// A [`Failure`] that says why.
pub fn file(path: &Path, contents: &str) -> Result<(), Failure> {
    replace(path, contents).map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))
}

/// Whoever reads the file, or is there after a crash, finds the old contents or the new ones and no part of
/// either. What is no plain file, such as a pipe, is written to as it is.
fn replace(path: &Path, contents: &str) -> io::Result<()> {
    // Through links: the file is meant, not what leads to it.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    match fs::metadata(&path) {
        Ok(there) if !there.is_file() => return fs::write(path, contents),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As any new file: what the umask leaves of it.
    let permissions = Permissions::from_mode(0o666);
    let mut new = tempfile::Builder::new().permissions(permissions).tempfile_in(directory)?;
    new.write_all(contents.as_bytes())?;
    new.persist(path)?;
    Ok(())
}
