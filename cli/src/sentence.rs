//! Sentences on standard error.

use std::fmt::Display;
use std::time::Duration;

use crate::standard_error;

/// How long a sentence waits for a reader of standard error who has stopped reading.
const PATIENCE: Duration = Duration::from_secs(5);

/// Says a sentence on standard error.
///
/// Nobody may be there to hear it, least of all when a VM has run for long; that
/// must not end anything, as `eprintln!` would, nor keep anything from its end.
pub fn say(sentence: impl Display) {
    standard_error::write(format!("ballast: {sentence}\n").as_bytes(), PATIENCE);
}

/// Writes text that is no sentence, such as help. It ends nothing either.
pub fn text(text: &str) {
    standard_error::write(text.as_bytes(), PATIENCE);
}

/// Says how far long work is. It waits for nobody: the work goes on.
pub fn progress(text: impl Display) {
    standard_error::write(format!("{text}\n").as_bytes(), Duration::ZERO);
}

/// Says a sentence of the log of a VM, which waits for nobody.
pub fn log(sentence: impl Display) {
    standard_error::write(format!("ballast: {sentence}\n").as_bytes(), Duration::ZERO);
}
