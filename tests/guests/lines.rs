//! What a process says, line by line, each with its moment.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Whether a test prints what it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Printed {
    /// For people who look for what went wrong.
    Yes,
    /// In a measurement, which it would cost time.
    No,
}

/// Lines that came in so far.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<(Instant, String)>>>);

impl Lines {
    /// Adds what comes from `source` from now on.
    pub(crate) fn follow(&self, source: impl Read + Send + 'static, prefix: &str, printed: Printed) {
        let (lines, prefix) = (self.clone(), prefix.to_owned());
        thread::spawn(move || {
            let mut source = BufReader::new(source);
            let mut line = Vec::new();
            while source.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if printed == Printed::Yes {
                    println!("{prefix}{text}");
                }
                lines.lock().push((Instant::now(), text));
                line.clear();
            }
        });
    }

    /// The first line from `start` on that contains `text`, and its number.
    pub(crate) fn find(&self, start: usize, text: &str) -> Option<(usize, String)> {
        let lines = self.lock();
        let (number, (_, line)) =
            lines.iter().enumerate().skip(start).find(|(_, (_, line))| line.contains(text))?;
        Some((number, line.clone()))
    }

    /// The moments of the lines that fit.
    pub(crate) fn when(&self, fits: impl Fn(Instant, &str) -> bool) -> Vec<Instant> {
        self.lock().iter().filter(|(at, line)| fits(*at, line)).map(|(at, _)| *at).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
