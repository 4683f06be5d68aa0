//! What the lab is at while nothing else is to be seen: bars on a terminal, plain lines elsewhere.

use std::fmt::Display as Show;
use std::io::{IsTerminal, Write, stderr};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a step that lasts says so in a plain line.
const BETWEEN_LINES: Duration = Duration::from_secs(10);
/// A step that is over sooner leaves no line.
const NOTEWORTHY: Duration = Duration::from_secs(1);

static SHOWN: AtomicBool = AtomicBool::new(false);

/// Shows what takes long from now on, on standard error. Tests leave it out.
pub fn show() {
    SHOWN.store(true, Ordering::Relaxed);
}

/// Something that takes long. It is over when this is dropped.
pub(crate) struct Step {
    what: String,
    begun: Instant,
    display: Display,
}

enum Display {
    Nothing,
    Bar(ProgressBar),
    /// When the last line was written.
    Lines(Mutex<Instant>),
}

/// Writes a line, which ends nothing where nobody can read it.
pub(crate) fn line(text: impl Show) {
    let _ = writeln!(stderr(), "{text}");
}

/// Begins one.
pub(crate) fn begin(what: impl Into<String>) -> Step {
    let (what, begun) = (what.into(), Instant::now());
    let display = match (SHOWN.load(Ordering::Relaxed), stderr().is_terminal()) {
        (false, _) => Display::Nothing,
        (true, false) => {
            line(&what);
            Display::Lines(Mutex::new(begun))
        }
        (true, true) => {
            let bar = ProgressBar::new_spinner().with_message(what.clone());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            Display::Bar(bar)
        }
    };
    Step { what, begun, display }
}

impl Step {
    /// Says how far it is.
    pub(crate) fn say(&self, detail: &str) {
        match &self.display {
            Display::Nothing => {}
            Display::Bar(bar) => bar.set_message(format!("{}: {detail}", self.what)),
            Display::Lines(last) => {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.elapsed() >= BETWEEN_LINES {
                    *last = Instant::now();
                    line(format_args!("{}: {detail} ({} s)", self.what, self.begun.elapsed().as_secs()));
                }
            }
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let took = self.begun.elapsed();
        match &self.display {
            Display::Bar(bar) => {
                bar.finish_and_clear();
                if took >= NOTEWORTHY {
                    line(format_args!("{}: {} s", self.what, took.as_secs()));
                }
            }
            Display::Lines(_) if took >= NOTEWORTHY => {
                line(format_args!("{}: {} s", self.what, took.as_secs()));
            }
            _ => {}
        }
    }
}
