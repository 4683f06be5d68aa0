//! An emulated host: runs one program and hands its outcome out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cpio::newc;
use rustix::io::Errno;
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};

use crate::job::{JOB, Job};
use crate::results::{EXIT_CODE, PORT, pack, write};
use crate::system::{End, end};
use crate::{modules, system};

/// What a shell would say of a program that could not be started.
const NOT_STARTED: i32 = 127;
/// How long a device may take to appear once its driver is loaded.
const APPEARS: Duration = Duration::from_secs(10);
/// Bits a second of a serial port.
const SPEED: u32 = 115_200;
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Does the job and switches the host off. To be called by process 1 and no other.
pub fn main() -> ! {
    if let Err(error) = system::mount_all().and_then(|()| work()) {
        println!("guest-init: {error}");
    }
    // The emulator is told to end at a reset; a power-off would need an ACPI driver.
    end(End::Reboot)
}

fn work() -> io::Result<()> {
    let job = Job::parse(&fs::read_to_string(JOB)?).map_err(io::Error::other)?;
    modules::load(job.modules.iter().map(String::as_str));
    // Programs that serve TCP on the loopback device need it up.
    let _ = Command::new("/bin/busybox").args(["ifconfig", "lo", "127.0.0.1", "up"]).status();
    // A wire that is a serial port keeps its modes for as long as somebody has it open.
    let results = open(&job.results, OpenOptions::new().write(true))?;
    plain(&results)?;
    let code = match start(&job) {
        Ok(child) => wait(child)?,
        Err(error) => {
            println!("guest-init: {} could not be started: {error}", job.arguments[0]);
            NOT_STARTED
        }
    };
    println!("guest-init: {} ended with {code}", job.arguments[0]);
    hand_out(&job, code, results)
}

/// Has a terminal change no byte, at the speed of a serial port's that is fastest. Others stay as they are.
fn plain(wire: &File) -> io::Result<()> {
    let mut modes = match tcgetattr(wire) {
        Ok(modes) => modes,
        Err(Errno::NOTTY | Errno::INVAL) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    modes.make_raw();
    modes.set_speed(SPEED)?;
    Ok(tcsetattr(wire, OptionalActions::Now, &modes)?)
}

fn start(job: &Job) -> io::Result<Child> {
    let console = console(job)?;
    // This process leads the session, and not the program: a leader's end hangs its terminal up, and what a serial
    // port still has to send is lost. Ctrl-C reaches both; nothing ends process 1.
    rustix::process::setsid()?;
    rustix::process::ioctl_tiocsctty(&console)?;
    let mut command = Command::new(&job.arguments[0]);
    command
        .args(&job.arguments[1..])
        .env(PORT, &job.results)
        .envs(job.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::from(console.try_clone()?))
        .stdout(Stdio::from(console.try_clone()?))
        .stderr(Stdio::from(console));
    command.spawn()
}

/// The console, as a terminal or as a pipe that changes no byte.
fn console(job: &Job) -> io::Result<File> {
    let console = open(&job.console, OpenOptions::new().read(true).write(true))?;
    if job.terminal {
        let mut modes = tcgetattr(&console)?;
        modes.set_speed(SPEED)?;
        tcsetattr(&console, OptionalActions::Now, &modes)?;
    } else {
        plain(&console)?;
    }
    Ok(console)
}

/// Opens a device, which may come a moment after its driver.
fn open(device: &Path, how: &OpenOptions) -> io::Result<File> {
    let start = Instant::now();
    loop {
        match how.open(device) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && start.elapsed() < APPEARS => {
                thread::sleep(LOOK_AGAIN);
            }
            opened => {
                return opened
                    .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", device.display())));
            }
        }
    }
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

fn hand_out(job: &Job, code: i32, mut port: File) -> io::Result<()> {
    for path in &job.bring {
        if let Err(error) = pack(&mut port, path) {
            println!("guest-init: {} can't be brought back: {error}", path.display());
        }
    }
    write(&mut port, EXIT_CODE, code.to_string().as_bytes())?;
    newc::trailer(&mut port)?;
    port.flush()?;
    // What a serial port still has to send would be lost at the end.
    let _ = tcdrain(&port);
    let _ = open(&job.console, OpenOptions::new().write(true)).map(tcdrain);
    Ok(())
}
