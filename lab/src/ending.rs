//! How an emulator comes to its end, by itself or not.

use std::io;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// How often a running emulator is looked after.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How an emulator ended.
pub enum Ended {
    /// It did.
    ByItself(ExitStatus),
    /// Not in time.
    TooLate,
    /// It was silent for too long.
    Silent,
    /// Nobody wanted it any more.
    Stopped,
}

/// What an emulator says of what it could not do, in its own log. A host's usual end is there too: with its
/// outcome there nobody reads it.
pub fn faults(log: &str) -> String {
    let faults = log.lines().filter(|line| line.contains(">>PANIC<<") || line.contains("p["));
    faults.map(|line| format!("{line}\n")).collect()
}

/// Waits for an emulator's end; ends it after `limit`, in silence, or once nobody wants it any more.
pub fn wait(
    child: &mut Child,
    limit: Duration,
    silent: impl Fn() -> bool,
    stopped: impl Fn() -> bool,
) -> io::Result<Ended> {
    let start = Instant::now();
    let reason = loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::ByItself(status));
        }
        if stopped() {
            break Ended::Stopped;
        }
        if silent() {
            break Ended::Silent;
        }
        if start.elapsed() > limit {
            break Ended::TooLate;
        }
        thread::sleep(LOOK_AGAIN);
    };
    child.kill()?;
    child.wait()?;
    Ok(reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_does_not_end_is_ended() {
        let sleeper = || Command::new("sleep").arg("600").spawn().expect("sleep runs");
        let long = Duration::from_secs(600);
        assert!(matches!(wait(&mut sleeper(), Duration::ZERO, || false, || false), Ok(Ended::TooLate)));
        assert!(matches!(wait(&mut sleeper(), long, || true, || false), Ok(Ended::Silent)));
        assert!(matches!(wait(&mut sleeper(), long, || true, || true), Ok(Ended::Stopped)));
        let mut short = Command::new("true").spawn().expect("true runs");
        let ended = wait(&mut short, long, || false, || false);
        assert!(matches!(ended, Ok(Ended::ByItself(status)) if status.success()));
    }

    #[test]
    fn only_what_an_emulator_could_not_do_is_told() {
        let panic = "00000000000p[CPU0  ] >>PANIC<< exception(): 3rd (13) exception with no resolution";
        let log = format!("00000000000e[CPU0  ] RDMSR: Unknown register 0xe7\n{panic}\n");
        assert_eq!(faults(&log), format!("{panic}\n"));
    }
}
