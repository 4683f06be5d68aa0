//! Standard output.

use std::io::{self, Write};

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
