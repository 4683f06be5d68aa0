//! `ballast-agent`: tells a guest's VM at once when the guest waits for memory.
//!
//! It sleeps until the kernel says that tasks have waited for memory for more
//! than a moment (a PSI trigger, Documentation/accounting/psi.rst), then sends
//! a few bytes to the virtio-console port [`api::agent::PORT`]; at a slow
//! rhythm it sends what the balloon's driver can't tell. It reads nothing from
//! the host, and a guest without it works as well, only slower to be heard.

// The standard start-up code is a seventh of such a small program: backtraces and
// guards for stacks, of which neither is needed here.
#![cfg_attr(not(test), no_main)]

mod cgroups;
mod figures;
mod port;
mod pressure;
mod session;
mod source;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use api::agent::Version;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::setpriority_process;

use crate::figures::Reader;
use crate::session::Session;

const HELP: &str = "\
Tells the VM that this guest runs in at once when the guest waits for memory.

Usage: ballast-agent [OPTIONS]

Options:
  --port PATH        The port to the VM [default: the virtio port org.ballast.agent.0]
  --every SECONDS    How often all figures are sent, 1 to 3600 [default: 10]
  --once             Print what would be sent, and end
  --version          Print the version
  --help             Print this

It needs the kernel module virtio_console, and runs as root. On a kernel without
pressure stall information (/proc/pressure; boot with psi=1 where it is switched
off) it looks at the kernel's counters instead, once a second, and four times a
second while little memory is available.";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    port: Option<PathBuf>,
    every: Duration,
    once: bool,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    Work(Options),
    Say(String),
}

impl Task {
    fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut options = Options { port: None, every: Duration::from_secs(10), once: false };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let argument = argument.to_string_lossy();
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
            match &*argument {
                // A path need not be Unicode.
                "--port" => options.port = Some(value()?.into()),
                "--every" => {
                    let text = value()?;
                    let text = text.to_string_lossy();
                    options.every = match text.parse() {
                        Ok(seconds @ 1..=3600) => Duration::from_secs(seconds),
                        _ => return Err(format!("`{text}` is not a number of seconds from 1 to 3600")),
                    };
                }
                "--once" => options.once = true,
                "--version" => return Ok(Self::Say(format!("ballast-agent {}", Version::OWN))),
                "--help" | "-h" => return Ok(Self::Say(HELP.to_owned())),
                _ => return Err(format!("`{argument}` is no option: see ballast-agent --help")),
            }
        }
        Ok(Self::Work(options))
    }
}

/// Called by the C library.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main() -> std::ffi::c_int {
    run().into()
}

/// Does what the command line asks for; gives the exit code.
#[cfg_attr(test, expect(dead_code, reason = "a test has a main function of its own"))]
fn run() -> u8 {
    // As Rust's start-up code does: whoever read the agent's words may go, and the agent stays.
    // SAFETY: no other thread is there, and nothing of Rust's runs on a signal that is ignored.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    match Task::parse(std::env::args_os().skip(1)) {
        Ok(Task::Say(text)) => {
            let _ = writeln!(io::stdout(), "{text}");
            0
        }
        Ok(Task::Work(options)) if options.once => {
            let _ = writeln!(io::stdout(), "{:#?}", Reader::new().all());
            0
        }
        Ok(Task::Work(options)) => {
            prepare();
            Session::new(options.port, options.every).run()
        }
        Err(sentence) => {
            complain(format_args!("{sentence}"));
            2
        }
    }
}

/// Says something to whoever looks after the agent. Where nobody does any more, or its log takes nothing now, it
/// works on.
fn complain(sentence: std::fmt::Arguments<'_>) {
    let stderr = io::stderr();
    let mut watched = [PollFd::new(&stderr, PollFlags::OUT)];
    if poll(&mut watched, Some(&Timespec::default())) == Ok(1)
        && watched[0].revents().contains(PollFlags::OUT)
    {
        let _ = writeln!(&stderr, "ballast-agent: {sentence}");
    }
}

/// Makes sure that the agent can act when nothing else in the guest can. Each
/// part needs rights that an ordinary user lacks, and helps by itself.
fn prepare() {
    // What it touches stays in memory; what it never does costs none.
    if let Err(error) = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT) {
        complain(format_args!(
            "its memory can't be locked ({error}): it may itself wait when memory is short"
        ));
    }
    let _ = setpriority_process(None, -20);
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Task, String> {
        Task::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn options_are_read() {
        let work = |port: Option<&str>, every, once| {
            Ok(Task::Work(Options { port: port.map(PathBuf::from), every: Duration::from_secs(every), once }))
        };
        assert_eq!(parse(&[]), work(None, 10, false));
        assert_eq!(parse(&["--every", "60", "--port", "/dev/x"]), work(Some("/dev/x"), 60, false));
        assert_eq!(parse(&["--once"]), work(None, 10, true));
        assert!(matches!(parse(&["--version"]), Ok(Task::Say(text)) if text.starts_with("ballast-agent ")));
        for wrong in [&["--every"][..], &["--every", "0"], &["--every", "x"], &["now"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
