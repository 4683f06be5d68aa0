//! What a program in an emulated host says: passed on as it comes, and how long ago that was.

use std::io::{self, Read, Write, stdout};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Terminal;
use crate::progress::Step;

/// A program's output, followed to its end.
pub struct Output {
    heard: Arc<Mutex<Instant>>,
    thread: JoinHandle<Vec<u8>>,
}

impl Output {
    /// Passes on what comes from `source`, as `terminal` says. The first word ends the step `until`.
    ///
    /// # Errors
    /// Where there is no thread to be had.
    pub fn follow(
        mut source: impl Read + Send + 'static,
        terminal: Terminal,
        until: Step,
    ) -> io::Result<Self> {
        let heard = Arc::new(Mutex::new(Instant::now()));
        let last = heard.clone();
        let thread = thread::Builder::new().spawn(move || {
            let (mut buffer, mut said, mut until) = ([0; 4096], Vec::new(), Some(until));
            while let Ok(length @ 1..) = source.read(&mut buffer) {
                drop(until.take());
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                pass_on(&buffer[..length], terminal);
                said.extend_from_slice(&buffer[..length]);
            }
            said
        })?;
        Ok(Self { heard, thread })
    }

    /// For how long nothing has been said.
    pub fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Waits until all has been passed on, and gives it.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.thread.join().unwrap_or_default()).into_owned()
    }
}

fn pass_on(said: &[u8], terminal: Terminal) {
    match terminal {
        // The test harness keeps what a passing test prints, where it is printed by this macro.
        Terminal::Printed => print!("{}", String::from_utf8_lossy(said)),
        Terminal::Output | Terminal::Interactive => drop(stdout().write_all(said)),
        Terminal::Kept => return,
    }
    let _ = stdout().flush();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::begin;

    #[test]
    fn silence_ends_with_a_word() {
        let (reader, mut writer) = std::io::pipe().expect("pipes can be made");
        let output = Output::follow(reader, Terminal::Printed, begin("a test")).expect("a thread");
        thread::sleep(Duration::from_millis(1));
        let before = Instant::now();
        assert!(output.silence() > before.elapsed(), "nothing was said");
        writer.write_all(b"word").expect("the other end reads");
        while output.silence() > before.elapsed() {
            assert!(before.elapsed() < Duration::from_secs(10), "the word was not heard");
            thread::yield_now();
        }
        drop(writer);
        assert_eq!(output.finish(), "word");
    }
}
