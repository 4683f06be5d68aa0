//! Sentences on standard error.

use std::fmt::Display;
use std::time::Duration;

use tracing::Level;

use crate::entry::Entry;
use crate::journal::{self, Journal};
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

/// Says a sentence of the log of a VM, which waits for nobody: to the journal with its fields, where there is one.
pub fn log(level: Level, entry: &Entry) {
    match journal::opened() {
        Some(journal) => log_to(journal, level, entry),
        None => say_at_once(entry),
    }
}

/// Hands an entry to the journal, or says it as a sentence where that does not take it now.
pub fn log_to(journal: &Journal, level: Level, entry: &Entry) {
    if !journal.send(level, entry) {
        say_at_once(entry);
    }
}

fn say_at_once(entry: &Entry) {
    standard_error::write(format!("ballast: {}\n", entry.sentence()).as_bytes(), Duration::ZERO);
}

/// Says what befell a VM, as [`say`] or to the journal.
pub fn befell(kind: &str, sentence: impl Display) {
    let entry = Entry::new(&sentence).of_kind(kind);
    if !journal::opened().is_some_and(|journal| journal.send(Level::INFO, &entry)) {
        say(sentence);
    }
}
