//! An emulated host: runs one program and hands its outcome out.
//!
//! The job is a text, a word and its value in a line:
//! ```text
//! module PATH PARAMETERS   loaded in this order
//! env NAME=VALUE
//! argument TEXT            the program, then each of its arguments
//! bring PATH               handed out afterwards: a file, or a directory with all below it
//! terminal                 the program gets a terminal for a person, not a plain pipe of bytes
//! ```
//! Output goes to the virtio console, the outcome as a cpio archive to the
//! virtio port named [`RESULTS`]: each file that was asked for, then
//! `exit-code`, whose presence says that the archive is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use cpio::newc;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::modules;
use crate::system::{End, end};

/// Where the job lies.
pub const JOB: &str = "/lab/job";
/// The name of the virtio port that takes the outcome.
const RESULTS: &str = "results";
/// What a shell would say of a program that could not be started.
const NOT_STARTED: i32 = 127;

/// What is to be done here.
#[derive(Debug, Default)]
struct Job {
    modules: String,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    bring: Vec<PathBuf>,
    terminal: bool,
}

impl Job {
    fn parse(text: &str) -> Result<Self, String> {
        let mut job = Self::default();
        for line in text.lines() {
            let (word, value) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "module" => {
                    job.modules.push_str(value);
                    job.modules.push('\n');
                }
                "env" => {
                    let (name, value) = value.split_once('=').ok_or_else(|| format!("no = in `{line}`"))?;
                    job.environment.push((name.to_owned(), value.to_owned()));
                }
                "argument" => job.arguments.push(value.to_owned()),
                "bring" => job.bring.push(PathBuf::from(value)),
                "terminal" => job.terminal = true,
                _ => return Err(format!("`{word}` is no word of a job")),
            }
        }
        if job.arguments.is_empty() { Err("no program is named".to_owned()) } else { Ok(job) }
    }
}

/// Does the job and switches the host off.
pub fn main() -> ! {
    if let Err(error) = work() {
        println!("guest-init: {error}");
    }
    // The emulator is told to end at a reset; a power-off would need an ACPI driver.
    end(End::Reboot)
}

fn work() -> io::Result<()> {
    let job = Job::parse(&fs::read_to_string(JOB)?).map_err(io::Error::other)?;
    modules::load(&job.modules);
    // Programs that serve TCP on the loopback device need it up.
    let _ = Command::new("/bin/busybox").args(["ifconfig", "lo", "127.0.0.1", "up"]).status();
    let code = match start(&job) {
        Ok(child) => wait(child)?,
        Err(error) => {
            println!("guest-init: {} could not be started: {error}", job.arguments[0]);
            NOT_STARTED
        }
    };
    println!("guest-init: {} ended with {code}", job.arguments[0]);
    hand_out(&job.bring, code)
}

fn start(job: &Job) -> io::Result<Child> {
    let console = console(job.terminal)?;
    let mut command = Command::new(&job.arguments[0]);
    command
        .args(&job.arguments[1..])
        .envs(job.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::from(console.try_clone()?))
        .stdout(Stdio::from(console.try_clone()?))
        .stderr(Stdio::from(console));
    let new_session = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: setsid and ioctl are async-signal-safe system calls; nothing is allocated.
    unsafe { command.pre_exec(new_session) };
    command.spawn()
}

/// The virtio console, as a terminal or as a pipe that changes no byte.
fn console(terminal: bool) -> io::Result<File> {
    let console = OpenOptions::new().read(true).write(true).open("/dev/hvc0")?;
    if !terminal {
        let mut modes = tcgetattr(&console)?;
        modes.make_raw();
        tcsetattr(&console, OptionalActions::Now, &modes)?;
    }
    Ok(console)
}

/// Waits for `child` as process 1 must: orphans of others are reaped on the way.
fn wait(child: Child) -> io::Result<i32> {
    let ours = rustix::process::Pid::from_child(&child);
    loop {
        let Some((pid, status)) = rustix::process::wait(rustix::process::WaitOptions::empty())? else {
            continue;
        };
        if pid == ours {
            let status = std::process::ExitStatus::from_raw(status.as_raw());
            return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
    }
}

fn hand_out(bring: &[PathBuf], code: i32) -> io::Result<()> {
    let mut port = OpenOptions::new().write(true).open(results_port()?)?;
    for path in bring {
        if let Err(error) = pack(path, &mut port) {
            println!("guest-init: {} can't be brought back: {error}", path.display());
        }
    }
    let text = code.to_string();
    let mut entry = newc::Builder::new("exit-code").mode(0o100644).write(&mut port, text.len() as u32);
    entry.write_all(text.as_bytes())?;
    entry.finish()?;
    newc::trailer(&mut port)?;
    port.flush()
}

fn pack(path: &Path, port: &mut File) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            pack(&entry?.path(), port)?;
        }
        return Ok(());
    }
    let contents = fs::read(path)?;
    let length = u32::try_from(contents.len()).map_err(|_| io::Error::other("4 GiB or more"))?;
    let mut entry = newc::Builder::new(&path.to_string_lossy()).mode(0o100644).write(&mut *port, length);
    entry.write_all(&contents)?;
    entry.finish()?;
    Ok(())
}

fn results_port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == RESULTS) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::other("this host has no port for results"))
}
