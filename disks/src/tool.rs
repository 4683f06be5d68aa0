//! Programs of others that are run to the end, or until the user stops it.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How soon a wish to stop is seen.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long a program may take to clean up after itself.
const PATIENCE: Duration = Duration::from_secs(20);
/// Lines that are kept of what a program says, to tell why it failed.
const LAST_LINES: usize = 12;
/// Bytes that are kept of a line.
const LINE: usize = 500;

/// Bytes that are taken of a program's answer.
const MOST_ANSWER: u64 = 1 << 20;

/// Whether the user has stopped it.
pub type Stop = AtomicBool;

/// Why a program did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// Programs that are not installed.
    #[error("{} missing here: apt-get install {}", are(.programs), .packages.join(" "))]
    Missing {
        /// The programs.
        programs: Vec<&'static str>,
        /// The Debian packages that have them.
        packages: Vec<&'static str>,
    },
    /// It could not be started, or not be heard.
    #[error("{program} can't be run: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ended otherwise than with success.
    #[error("{program} failed ({status}); the last that it said:\n{said}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last lines.
        said: String,
    },
    /// The user stopped it.
    #[error("stopped")]
    Stopped,
}

fn are(programs: &[&str]) -> String {
    let verb = if programs.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", programs.join(", "))
}

/// A program, and the package of Debian that has it.
pub struct Tool {
    /// The program's name.
    pub program: &'static str,
    /// The package's.
    pub package: &'static str,
}

/// Where programs are looked for: as the user says, and where administrators' programs are.
pub fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    for directory in ["/usr/sbin", "/sbin"] {
        if !env::split_paths(&path).any(|known| known == Path::new(directory)) {
            path.push(":");
            path.push(directory);
        }
    }
    path
}

fn find(program: &str) -> Option<PathBuf> {
    let can_run = |file: &Path| {
        file.metadata().is_ok_and(|there| there.is_file() && there.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&search_path()).map(|directory| directory.join(program)).find(|file| can_run(file))
}

/// Looks whether `tools` are all installed.
///
/// # Errors
/// [`ToolError::Missing`] names those that are not.
pub fn look_for<'a>(tools: impl IntoIterator<Item = &'a Tool>) -> Result<(), ToolError> {
    let missing: Vec<&Tool> = tools.into_iter().filter(|tool| find(tool.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs = missing.iter().map(|tool| tool.program).collect();
    let mut packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    Err(ToolError::Missing { programs, packages })
}

/// Runs a program to its end, and hands each line that it says on standard error to `say`. Where `stop` becomes
/// true it is asked to end, with all that it started, and killed where it does not.
///
/// # Errors
/// [`ToolError`].
pub fn run(mut command: Command, stop: &Stop, say: impl FnMut(&str)) -> Result<(), ToolError> {
    command.stdout(Stdio::null());
    let status = to_its_end(&mut command, stop, say)?;
    status.map_err(|(status, said)| failed_with(&command, status, &said))
}

/// Runs a program to its end and gives what it writes on standard output, up to [`MOST_ANSWER`]. Codes in `fine` are
/// success too.
///
/// # Errors
/// [`ToolError`].
pub fn ask(mut command: Command, stop: &Stop, fine: &[i32]) -> Result<Vec<u8>, ToolError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| ToolError::Start { program: program.clone(), source };
    let mut answer = tempfile::tempfile().map_err(failed)?;
    command.stdout(answer.try_clone().map_err(failed)?);
    match to_its_end(&mut command, stop, |_| {})? {
        Err((status, said)) if !status.code().is_some_and(|code| fine.contains(&code)) => {
            return Err(failed_with(&command, status, &said));
        }
        _ => {}
    }
    let mut bytes = Vec::new();
    answer.rewind().and_then(|()| answer.take(MOST_ANSWER).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(bytes)
}

fn failed_with(command: &Command, status: ExitStatus, said: &str) -> ToolError {
    let program = command.get_program().to_string_lossy().into_owned();
    ToolError::Failed { program, status, said: said.to_owned() }
}

/// How a program ended, with its last words where that is no success.
type Ended = Result<(), (ExitStatus, String)>;

fn to_its_end(command: &mut Command, stop: &Stop, mut say: impl FnMut(&str)) -> Result<Ended, ToolError> {
    let program = command.get_program().to_string_lossy().into_owned();
    if stop.load(Ordering::Relaxed) {
        return Err(ToolError::Stopped);
    }
    let failed = |source| ToolError::Start { program: program.clone(), source };
    // A group of its own: a Ctrl-C of the terminal's reaches this process alone, which passes it on.
    command.env("PATH", search_path()).process_group(0);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let (lines, heard) = mpsc::channel();
    if let Some(errors) = child.stderr.take() {
        let reader = thread::Builder::new().name("listen".to_owned());
        // It ends with the last process that could say something.
        let started = reader.spawn(move || {
            for line in BufReader::new(errors).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(line.get(..LINE).unwrap_or(&line)).into_owned();
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        if let Err(source) = started {
            end(&mut child);
            return Err(failed(source));
        }
    }
    let mut last = VecDeque::new();
    let status = loop {
        match heard.recv_timeout(LOOK_AGAIN) {
            Ok(line) => {
                say(&line);
                if last.len() == LAST_LINES {
                    last.pop_front();
                }
                last.push_back(line);
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => thread::sleep(LOOK_AGAIN),
        }
        if stop.load(Ordering::Relaxed) {
            end(&mut child);
            return Err(ToolError::Stopped);
        }
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
    };
    if status.success() {
        return Ok(Ok(()));
    }
    last.extend(heard.try_iter());
    let said = last.iter().map(|line| format!("  {}", line.trim_end())).collect::<Vec<_>>().join("\n");
    Ok(Err((status, said)))
}

/// Ends a program and all that it started. It may clean up first.
fn end(child: &mut Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let tell = |signal| group.map(|group| kill_process_group(group, signal));
    let started = Instant::now();
    tell(Signal::TERM);
    while started.elapsed() < PATIENCE {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        thread::sleep(LOOK_AGAIN);
    }
    // What it started and left behind, and itself.
    tell(Signal::KILL);
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn missing_programs_are_told_with_the_packages_that_have_them() {
        let tools = [
            Tool { program: "sh", package: "dash" },
            Tool { program: "no-such-program", package: "some-package" },
        ];
        let error = look_for(&tools).expect_err("one is missing").to_string();
        assert_eq!(error, "no-such-program is missing here: apt-get install some-package");
        assert!(look_for(&tools[..1]).is_ok());
    }

    #[test]
    fn what_a_program_said_tells_why_it_failed() {
        let mut heard = Vec::new();
        let error =
            run(shell("for n in $(seq 20); do echo line $n >&2; done; exit 3"), &Stop::new(false), |line| {
                heard.push(line.to_owned());
            })
            .expect_err("it fails")
            .to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("  line 20"), "{error}");
        assert!(!error.contains("line 2\n"), "{error}");
        assert_eq!(heard.first().map(String::as_str), Some("line 1"));
        assert!(run(shell("exit 0"), &Stop::new(false), |_| {}).is_ok());
    }

    #[test]
    fn a_program_that_is_stopped_may_clean_up_and_takes_its_children_along() {
        let directory = tempfile::tempdir().expect("a directory");
        let left = directory.path().join("left");
        let script = format!(
            "trap 'rm -f {left}; exit 1' TERM; echo > {left}; sleep 1000 & echo $! >&2; wait",
            left = left.display()
        );
        let stop = Stop::new(false);
        let mut child = None;
        let result = run(shell(&script), &stop, |line| {
            child = line.parse::<i32>().ok();
            stop.store(true, Ordering::Relaxed);
        });
        assert!(matches!(result, Err(ToolError::Stopped)), "{result:?}");
        assert!(!left.exists());
        let child = Pid::from_raw(child.expect("it was told")).expect("a process");
        // A zombie of init's at most.
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", child.as_raw_nonzero()));
            state.map_or(true, |stat| stat.contains(") Z "))
        };
        let begun = Instant::now();
        while !gone() {
            assert!(begun.elapsed() < PATIENCE, "its child runs on");
            thread::sleep(LOOK_AGAIN);
        }
        assert!(matches!(run(shell("true"), &stop, |_| {}), Err(ToolError::Stopped)));
    }
}
