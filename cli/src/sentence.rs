//! Sentences on standard error.

use std::fmt::Display;
use std::io::{self, Write};

/// Says a sentence on standard error.
///
/// Nobody may be there to hear it, least of all when a VM has run for long; that
/// must not end anything, as `eprintln!` would.
pub fn say(sentence: impl Display) {
    let _ = io::stderr().lock().write_all(format!("ballast: {sentence}\n").as_bytes());
}
