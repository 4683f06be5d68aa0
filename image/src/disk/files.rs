//! Files of a file system, as the search wants them.

use super::SearchError;

/// A file system. Paths begin with `/`, and links are followed within it.
pub trait Files {
    /// The names in a directory, as far as they are text, in no order; none where there is no such directory.
    ///
    /// # Errors
    /// [`SearchError`] where the file system is damaged.
    fn names(&self, directory: &str) -> Result<Vec<String>, SearchError>;

    /// Bytes of a regular file; `None` where there is none.
    ///
    /// # Errors
    /// As [`names`](Self::names).
    fn size(&self, path: &str) -> Result<Option<u64>, SearchError>;

    /// Where the links of `path` lead in the end; `path` itself where there is no such file.
    ///
    /// # Errors
    /// As [`names`](Self::names).
    fn resolve(&self, path: &str) -> Result<String, SearchError>;

    /// Hands all of a regular file to `take`, piece by piece.
    ///
    /// # Errors
    /// As [`names`](Self::names), and what `take` says.
    fn read(
        &self,
        path: &str,
        take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>,
    ) -> Result<(), SearchError>;
}

/// Names in a directory that are looked at, at most.
pub const MOST_NAMES: usize = 10_000;

/// Bytes of a text file that is looked at, at most.
const MOST_TEXT: u64 = 64 << 10;

/// A text file; `None` where there is none, or one that is too long for what is in such files.
///
/// # Errors
/// As [`Files::read`].
pub fn text(files: &dyn Files, path: &str) -> Result<Option<String>, SearchError> {
    if files.size(path)?.is_none_or(|size| size > MOST_TEXT) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    files.read(path, &mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
