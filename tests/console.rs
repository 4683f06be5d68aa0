//! The console of `ballast run` on a real terminal, and on pipes that end; and what becomes of two
//! VMs with one name.

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use api::runtime;
use guests::{BOOT, Host, ballast, images, wait_for};
use lab::Kernel;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// How long a process takes for what needs no guest.
const SOON: Duration = Duration::from_secs(5);

/// What a process has said so far.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn by(mut source: impl Read + Send + 'static) -> Self {
        let said = Self::default();
        let sink = said.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                print!("{}", String::from_utf8_lossy(&buffer[..count]));
                sink.0.lock().expect("no reader panics").extend_from_slice(&buffer[..count]);
            }
        });
        said
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("no reader panics")).into_owned()
    }

    fn wait_for(&self, text: &str, usually: Duration) {
        wait_for(&format!("`{text}`"), usually, || self.text().contains(text).then_some(()));
    }
}

/// A terminal with settings that nobody has by default.
struct Terminal {
    master: OwnedFd,
    user: OwnedFd,
    before: Termios,
}

impl Terminal {
    fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("the host has terminals");
        grantpt(&master).expect("it is ours");
        unlockpt(&master).expect("it is ours");
        let name = ptsname(&master, Vec::new()).expect("it has a name");
        let user = fs::File::options().read(true).write(true).open(name.to_str().expect("ASCII"));
        let user = OwnedFd::from(user.expect("a terminal can be opened"));
        let mut before = tcgetattr(&user).expect("a terminal has settings");
        before.input_modes.toggle(InputModes::IXON | InputModes::IGNBRK);
        before.local_modes.toggle(LocalModes::ECHOK | LocalModes::NOFLSH);
        tcsetattr(&user, OptionalActions::Now, &before).expect("settings can be set");
        let before = tcgetattr(&user).expect("a terminal has settings");
        Self { master, user, before }
    }

    fn stdio(&self) -> Stdio {
        Stdio::from(self.user.try_clone().expect("a descriptor can be copied"))
    }

    fn type_in(&self, text: &str) {
        let written = rustix::io::write(self.master.as_fd(), text.as_bytes());
        assert_eq!(written, Ok(text.len()), "the terminal takes all of it");
    }

    fn wait_until_raw(&self) {
        wait_for("the terminal to be raw", SOON, || {
            let now = tcgetattr(&self.user).expect("a terminal has settings");
            let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
            (!now.local_modes.intersects(cooked)).then_some(())
        });
    }

    fn assert_restored(&self, after: &str) {
        let now = tcgetattr(&self.user).expect("a terminal has settings");
        assert_eq!(format!("{now:?}"), format!("{:?}", self.before), "after {after}");
    }
}

/// A `ballast run` that a test may drop at any time.
struct Run {
    child: Child,
    console: Said,
    errors: Said,
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Run {
    /// A guest that takes steps from its console, or a program that fails before.
    fn start(name: &str, stdin: Stdio, arguments: &[&str]) -> Self {
        Self::with_output(name, stdin, Stdio::piped(), arguments)
    }

    /// As [`start`](Self::start), with a console that goes elsewhere.
    fn with_output(name: &str, stdin: Stdio, stdout: Stdio, arguments: &[&str]) -> Self {
        let images = images(Kernel::V6_1);
        let mut command = Command::new(ballast());
        command.args(["run", "--memory", "128M", "--name", name]);
        command.arg("--kernel").arg(&images.bzimage).arg("--initrd").arg(&images.initrd);
        command.args(["--cmdline", "console=ttyS0 panic=-1 quiet ballast.console"]).args(arguments);
        let mut child =
            command.stdin(stdin).stdout(stdout).stderr(Stdio::piped()).spawn().expect("ballast can be run");
        let console = child.stdout.take().map(Said::by).unwrap_or_default();
        let errors = Said::by(child.stderr.take().expect("it is piped"));
        Self { child, console, errors }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    fn wait_for_end(&mut self) -> ExitStatus {
        wait_for("the end of ballast", SOON, || self.child.try_wait().expect("the child is ours"))
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the child is ours").is_none()
    }

    /// Whether what brings its console's output to the reader is in the middle of a write.
    fn writes(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it runs");
        let mut calls = tasks.filter_map(|task| {
            let task = task.ok()?.path();
            let name = fs::read_to_string(task.join("comm")).ok()?;
            (name.trim() == "console").then(|| fs::read_to_string(task.join("syscall")).ok())?
        });
        // The number of write(2) on x86-64.
        calls.any(|call| call.starts_with("1 "))
    }

    /// Processor time that its event loop has taken, in ticks of 10 ms.
    fn ticks_of_devices(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it runs");
        let stat = tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok())
            .find(|stat| stat.contains("(devices)"))
            .expect("it has a thread for devices");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        [fields[11], fields[12]].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
    }
}

/// Whether a VM of this name answers on its socket, and runs: one that is only set up yet has no
/// guest to press a power button for.
fn answers(name: &str) -> bool {
    let socket = runtime::socket(name).expect("there is a runtime directory");
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let mut answer = String::new();
    stream.write_all(b"GET /vm HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n").is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 200")
        && answer.contains("\"state\":\"running\"")
}

fn a_guest_powers_off(terminal: &Terminal) {
    let mut run = Run::start("poweroff", terminal.stdio(), &[]);
    terminal.wait_until_raw();
    run.console.wait_for("READY", BOOT);
    terminal.type_in("rest:1ms\n");
    run.console.wait_for("DONE rest:1ms", BOOT);
    terminal.type_in("\x01\x01\n");
    run.console.wait_for("ERROR `\x01` is no step", BOOT);
    // Ctrl-C is the guest's as well.
    terminal.type_in("\x03");
    assert!(run.is_running());
    terminal.type_in("\nend\n");
    assert_eq!(run.wait_for_end().code(), Some(0), "{}", run.errors.text());
    terminal.assert_restored("a power-off");
    run.errors.wait_for("The guest powered off.", SOON);
    assert!(!run.console.text().contains("The guest powered off."), "stdout is the guest's alone");
    assert!(!run.errors.text().contains("READY"), "stderr is ballast's alone");
}

fn ends_from_outside(terminal: &Terminal) {
    let mut run = Run::start("quit", terminal.stdio(), &[]);
    terminal.wait_until_raw();
    terminal.type_in("\x01x");
    assert_eq!(run.wait_for_end().code(), Some(14));
    terminal.assert_restored("Ctrl-A x");

    let mut run = Run::start("sigterm", terminal.stdio(), &[]);
    terminal.wait_until_raw();
    wait_for("its API", SOON, || answers("sigterm").then_some(()));
    run.signal(Signal::TERM);
    run.errors.wait_for("power button", SOON);
    assert!(run.is_running(), "the guest may switch itself off");
    run.signal(Signal::TERM);
    assert_eq!(run.wait_for_end().code(), Some(0));
    terminal.assert_restored("SIGTERM twice");

    for signal in [Signal::ABORT, Signal::SEGV] {
        let mut run = Run::start("crash", terminal.stdio(), &["--no-api"]);
        terminal.wait_until_raw();
        run.signal(signal);
        assert_eq!(run.wait_for_end().signal(), Some(signal.as_raw()));
        terminal.assert_restored("a crash");
    }
}

/// A failure in the middle of the set-up, with the terminal raw or not yet.
fn fails_to_start(terminal: &Terminal) {
    let mut run = Run::start("broken", terminal.stdio(), &["--console", "file:/nowhere/console"]);
    assert_eq!(run.wait_for_end().code(), Some(1));
    terminal.assert_restored("a failed start");
    run.errors.wait_for("/nowhere/console", SOON);
    assert_eq!(run.console.text(), "");
}

/// `ballast run ... | less`, where nobody turns the page.
fn ends_with_a_console_that_nobody_reads() {
    for ending in ["signals", "keys"] {
        let (_unread, output) = full_pipe();
        let mut run = Run::with_output("unread", Stdio::piped(), output.into(), &[]);
        wait_for("output that nobody reads", BOOT, || run.writes().then_some(()));
        let mut keys = run.child.stdin.take().expect("it is piped");
        keys.write_all(b"for the guest").expect("it listens");
        let code = if ending == "keys" {
            keys.write_all(b"\x01x").expect("it listens");
            14
        } else {
            run.signal(Signal::TERM);
            run.errors.wait_for("power button", SOON);
            run.signal(Signal::TERM);
            0
        };
        assert_eq!(run.wait_for_end().code(), Some(code), "by {ending}: {}", run.errors.text());
    }
}

/// A pipe into which nothing more goes, and where it could be read.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a flag of a pipe");
    while (&writer).write_all(&[0; 512]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("a flag of a pipe");
    (reader, writer)
}

/// `ballast run ... <file`, and output to the end of another file.
fn reads_its_input_from_a_file() {
    let (script, output) = ("/tmp/script", "/tmp/output");
    fs::write(script, format!("{}end\n", "rest:1ms\n".repeat(100))).expect("there is room");
    fs::write(output, "before\n").expect("there is room");
    let script = fs::File::open(script).expect("it is there");
    let console = format!("file:{output}");
    let mut run =
        Run::start("file", script.try_clone().expect("a descriptor").into(), &["--console", &console]);
    run.errors.wait_for("appended to /tmp/output", SOON);
    wait_for("the guest", BOOT, || fs::read_to_string(output).ok()?.contains("READY").then_some(()));
    run.signal(Signal::KILL);
    run.wait_for_end();
    assert!(fs::read_to_string(output).expect("it is there").starts_with("before\n"));

    let mut run = Run::start("script", script.into(), &[]);
    assert_eq!(
        wait_for("the end of the script", BOOT, || run.child.try_wait().expect("ours")).code(),
        Some(0)
    );
    assert_eq!(run.console.text().matches("DONE rest:1ms").count(), 100, "{}", run.console.text());
}

/// `ballast console` on a VM that has no console of its own.
fn attaches_from_elsewhere(terminal: &Terminal) {
    let mut run = Run::start("far", Stdio::null(), &["--console", "none"]);
    wait_for("its API", BOOT, || answers("far").then_some(()));
    let attach = |stdin: Stdio, arguments: &[&str]| {
        let mut command = Command::new(ballast());
        command.args(["console", "far"]).args(arguments);
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ballast can be run");
        let console = Said::by(child.stdout.take().expect("it is piped"));
        let errors = Said::by(child.stderr.take().expect("it is piped"));
        Run { child, console, errors }
    };
    let watcher = attach(Stdio::null(), &["--watch"]);
    let mut writer = attach(terminal.stdio(), &[]);
    terminal.wait_until_raw();
    writer.console.wait_for("READY", BOOT);
    terminal.type_in("rest:1ms\n");
    writer.console.wait_for("DONE rest:1ms", BOOT);
    watcher.console.wait_for("DONE rest:1ms", SOON);
    let mut second = attach(Stdio::null(), &[]);
    assert_eq!(second.wait_for_end().code(), Some(1));
    second.errors.wait_for("--take-over", SOON);
    terminal.type_in("\x01x");
    assert_eq!(writer.wait_for_end().code(), Some(0), "{}", writer.errors.text());
    terminal.assert_restored("detaching");
    assert!(run.is_running(), "the VM runs on");

    let mut last = attach(Stdio::piped(), &["--take-over"]);
    last.console.wait_for("DONE rest:1ms", SOON);
    let mut keys = last.child.stdin.take().expect("it is piped");
    keys.write_all(b"end\n").expect("it listens");
    drop(keys);
    let ended = wait_for("the end of the VM", BOOT, || run.child.try_wait().expect("ours"));
    assert_eq!(ended.code(), Some(0), "{}", run.errors.text());
    for mut client in [last, watcher] {
        assert_eq!(client.wait_for_end().code(), Some(0), "{}", client.errors.text());
        client.errors.wait_for("`far` has ended", SOON);
    }
}

fn one_name_for_two(terminal: &Terminal) {
    let mut first = Run::start("twin", Stdio::piped(), &[]);
    // The end of its input.
    drop(first.child.stdin.take());
    first.console.wait_for("READY", BOOT);
    let before = first.ticks_of_devices();
    wait_for("three seconds of an idle guest", SOON, || {
        thread::sleep(Duration::from_secs(3));
        Some(())
    });
    let taken = first.ticks_of_devices() - before;
    assert!(taken < 60, "the event loop took {taken} of 300 ticks with nothing to do");
    assert!(first.is_running() && answers("twin"), "the end of its input is not the end of a VM");

    let mut second = Run::start("twin", terminal.stdio(), &[]);
    assert_eq!(second.wait_for_end().code(), Some(1));
    terminal.assert_restored("a name that is taken");
    second.errors.wait_for("twin", SOON);
    println!("a second VM says: {}", second.errors.text());
    assert!(second.errors.text().contains("already"), "{}", second.errors.text());
    assert_eq!(second.console.text(), "");
    assert!(first.is_running() && answers("twin"), "the first lives on");

    first.signal(Signal::KILL);
    assert_eq!(first.wait_for_end().signal(), Some(9));
    assert!(runtime::socket("twin").expect("a runtime directory").exists(), "nobody could remove it");
    assert!(!answers("twin"));
    let mut third = Run::start("twin", Stdio::null(), &[]);
    wait_for("a VM in the place of a dead one", SOON, || answers("twin").then_some(()));
    third.signal(Signal::TERM);
    third.errors.wait_for("power button", SOON);
    third.signal(Signal::TERM);
    assert_eq!(third.wait_for_end().code(), Some(0));
    assert!(!runtime::socket("twin").expect("a runtime directory").exists(), "it goes with its VM");
}

#[test]
fn the_terminal_is_given_back_and_names_are_one_vms_own() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(90)).run(|| {
        let terminal = Terminal::new();
        ends_from_outside(&terminal);
        ends_with_a_console_that_nobody_reads();
        fails_to_start(&terminal);
        reads_its_input_from_a_file();
        one_name_for_two(&terminal);
        a_guest_powers_off(&terminal);
        attaches_from_elsewhere(&terminal);
    });
}
