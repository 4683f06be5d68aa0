//! The live view: one bar a guest, the host's below; plain lines where there is no terminal.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use api::units::Bytes;

use crate::history::{Guest, GuestSample, History, Sample};

/// Characters of a bar.
const WIDTH: usize = 50;
/// How often a plain line is printed.
const BETWEEN_LINES: Duration = Duration::from_secs(5);

/// What has been drawn so far.
pub struct View {
    terminal: bool,
    drawn: usize,
    last: Option<Duration>,
}

impl View {
    /// One for a terminal, or for a file or pipe.
    pub const fn new(terminal: bool) -> Self {
        Self { terminal, drawn: 0, last: None }
    }

    /// Shows the last sample.
    pub fn show(&mut self, history: &History) {
        let Some(sample) = history.samples.last() else { return };
        if self.terminal {
            self.draw(&bars(history, sample));
        } else if self.last.is_none_or(|last| sample.time >= last + BETWEEN_LINES) {
            self.last = Some(sample.time);
            println!("{}", line(history, sample));
        }
    }

    /// Leaves the last picture standing.
    pub fn end(&mut self) {
        self.drawn = 0;
        println!();
    }

    fn draw(&mut self, picture: &str) {
        let mut text = String::new();
        if self.drawn > 0 {
            let _ = write!(text, "\x1b[{}A", self.drawn);
        }
        for line in picture.lines() {
            let _ = write!(text, "\r\x1b[2K{line}\r\n");
        }
        self.drawn = picture.lines().count();
        print!("{text}");
        let _ = std::io::stdout().flush();
    }
}

/// Sizes in a column of whole MiB.
fn mib(bytes: Bytes) -> String {
    format!("{:>4} MiB", bytes.0 >> 20)
}

fn bars(history: &History, sample: &Sample) -> String {
    let mut text = format!("{:>5.0} s   █ used   ▒ has   │ target   · limit\n", sample.time.as_secs_f64());
    for (guest, now) in history.guests.iter().zip(&sample.guests) {
        let _ = match now {
            Some(now) => {
                let used = now.used.map_or_else(|| "     ...".to_owned(), mib);
                let bar = bar(guest, now);
                writeln!(
                    text,
                    "{:>5}  {bar}  used {used}  has {}  target {}",
                    guest.name,
                    mib(now.actual),
                    mib(now.target)
                )
            }
            None if guest.exit.is_some() => writeln!(text, "{:>5}  {:WIDTH$}  has ended", guest.name, ""),
            None => writeln!(text, "{:>5}  {:WIDTH$}  starts", guest.name, ""),
        };
    }
    let held = sample.sum(|guest| guest.rss);
    let filled = share(held, history.budget);
    let bar: String = (0..WIDTH).map(|at| if at < filled { '█' } else { '·' }).collect();
    let _ =
        writeln!(text, "{:>5}  {bar}  held {}  of a budget of {}", "host", mib(held), mib(history.budget));
    text
}

fn bar(guest: &Guest, now: &GuestSample) -> String {
    let (used, has) = (share(now.used.unwrap_or_default(), guest.max), share(now.actual, guest.max));
    let target = share(now.target, guest.max).min(WIDTH - 1);
    (0..WIDTH)
        .map(|at| match at {
            _ if at == target => '│',
            _ if at < used => '█',
            _ if at < has => '▒',
            _ => '·',
        })
        .collect()
}

/// Characters of a bar that `part` of `whole` fills.
fn share(part: Bytes, whole: Bytes) -> usize {
    (part.0 as u128 * WIDTH as u128 / u128::from(whole.0.max(1))).min(WIDTH as u128) as usize
}

fn line(history: &History, sample: &Sample) -> String {
    let mut text = format!("{:>5.0} s", sample.time.as_secs_f64());
    for (guest, now) in history.guests.iter().zip(&sample.guests) {
        let _ = match now {
            Some(now) => write!(
                text,
                "   {}: used {} of {}, target {}",
                guest.name,
                now.used.map_or_else(|| "  ?".to_owned(), |used| (used.0 >> 20).to_string()),
                now.actual.0 >> 20,
                now.target.0 >> 20
            ),
            None if guest.exit.is_some() => write!(text, "   {}: ended", guest.name),
            None => write!(text, "   {}: starts", guest.name),
        };
    }
    let held = sample.sum(|guest| guest.rss).0 >> 20;
    let _ = write!(text, "   host: holds {held} of {} MiB", history.budget.0 >> 20);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_share() {
        assert_eq!(share(Bytes::mib(256), Bytes::mib(512)), WIDTH / 2);
        assert_eq!(share(Bytes::mib(600), Bytes::mib(512)), WIDTH);
        assert_eq!(share(Bytes::mib(600), Bytes::ZERO), WIDTH);
    }
}
