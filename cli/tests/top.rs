//! `ballast top` on a real terminal, among VMs and a balancer that come and go.

#[path = "../../balancer/tests/fakes/mod.rs"]
mod fakes;

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use api::units::Bytes;
use fakes::{FakeVm, Manner};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, OptionalActions, Termios, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use serde_json::Value;
use tokio::runtime::Handle;

const LIMITS: &str = "256M,min=128M,max=1G";

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

fn ballast(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.args(arguments).env("BALLAST_RUNTIME_DIR", directory).env("TERM", "xterm").env_remove("NO_COLOR");
    command
}

/// `ballast top` on a terminal of its own, which has a setting that nobody has by default.
struct Top {
    child: Child,
    keys: File,
    user: OwnedFd,
    before: Termios,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Top {
    fn start(directory: &Path, columns: u16, rows: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let user =
            OwnedFd::from(File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap());
        let mut before = tcgetattr(&user).unwrap();
        before.input_modes.toggle(InputModes::IXON | InputModes::IGNBRK);
        tcsetattr(&user, OptionalActions::Now, &before).unwrap();
        let before = tcgetattr(&user).unwrap();
        tcsetwinsize(&user, size(columns, rows)).unwrap();
        let stdio = || Stdio::from(user.try_clone().unwrap());
        let arguments = ["top", "--interval", "100ms", "--sort", "name"];
        let mut command = ballast(directory, &arguments);
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(cells(rows), cells(columns), 0)));
        let sink = Arc::clone(&screen);
        let mut output = File::from(master.try_clone().unwrap());
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                sink.lock().unwrap().process(&buffer[..count]);
            }
        });
        Self { child, keys: File::from(master), user, before, screen }
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    fn wait_for(&self, text: &str) {
        let begun = Instant::now();
        while !self.text().contains(text) {
            assert!(begun.elapsed() < PATIENCE, "gave up waiting for {text:?} on\n{}", self.text());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn resize(&self, columns: u16, rows: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(cells(rows), cells(columns));
        tcsetwinsize(&self.user, size(columns, rows)).unwrap();
        self.signal(Signal::WINCH);
    }

    /// Waits for the end, and sees that the terminal is as it was.
    fn assert_over(mut self, after: &str) -> Option<i32> {
        let mut code = None;
        until(&format!("its end after {after}"), || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        until("the shell's screen with a cursor", || {
            let parser = self.screen.lock().unwrap();
            !parser.screen().alternate_screen() && !parser.screen().hide_cursor()
        });
        let now = tcgetattr(&self.user).unwrap();
        assert_eq!(format!("{now:?}"), format!("{:?}", self.before), "after {after}");
        code.unwrap().code()
    }
}

fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).expect("a screen has cells")
}

const fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "gave up waiting for {what:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs the fakes in a thread of their own, as tests wait without them.
fn runtime() -> Handle {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

#[test]
fn the_terminal_is_given_back_however_it_ends() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let _vm = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(100));
    for (after, end) in [
        ("q", (|top: &mut Top| top.press("q")) as fn(&mut Top)),
        ("Ctrl-C", |top| top.press("\x03")),
        ("Ctrl-C while typing", |top| top.press("/we\x03")),
        ("SIGTERM", |top| top.signal(Signal::TERM)),
        ("SIGINT", |top| top.signal(Signal::INT)),
        ("SIGHUP", |top| top.signal(Signal::HUP)),
    ] {
        let mut top = Top::start(directory.path(), 80, 24);
        top.wait_for("web");
        end(&mut top);
        assert_eq!(top.assert_over(after), Some(0), "after {after}");
    }
}

#[test]
fn a_terminal_that_changes_its_size_gets_another_picture() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let vms: Vec<FakeVm> = (0..200)
        .map(|n| FakeVm::start(directory.path(), &format!("vm-{n:03}"), LIMITS, Bytes::mib(100)))
        .collect();
    let mut top = Top::start(directory.path(), 80, 24);
    top.wait_for("200 VMs, 1-14 shown");
    top.resize(120, 60);
    top.wait_for("1-50 shown");
    top.wait_for("vm-049");
    top.resize(80, 24);
    top.press("G");
    top.wait_for("vm-199");
    top.resize(20, 4);
    top.wait_for("needs");
    top.press("q");
    assert_eq!(top.assert_over("q on a small screen"), Some(0));
    assert!(vms.iter().all(|vm| vm.state().connections <= 2), "a connection for each picture");
}

#[test]
fn limits_are_set_and_what_the_vm_says_is_shown() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(100));
    let mut top = Top::start(directory.path(), 80, 24);
    top.wait_for("web");
    top.press("l");
    top.wait_for("New limits of web");
    // Ctrl-U clears the line.
    top.press("\x15300M,max=lots\r");
    top.wait_for("`lots` is not a size");
    top.press("\x15300M,min=128M,max=1G\r");
    top.wait_for("has new limits");
    let wanted = "300M,min=128M,max=1G".parse().unwrap();
    assert_eq!(vm.state().memory.limits, wanted);
    drop(vm);
    top.wait_for("no VMs");
    top.press("q");
    top.assert_over("q");
}

#[test]
fn a_balancer_that_comes_and_goes_is_said_to() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let _vm = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(400));
    let _mad = FakeVm::start(directory.path(), "mad", LIMITS, Bytes::mib(400));
    _mad.state().manner = Manner::Garbage;
    let mut top = Top::start(directory.path(), 80, 24);
    top.wait_for("no balancer runs: VMs asked directly");
    top.wait_for("unreadable");
    for sudden in [true, false] {
        let mut balancer = ballast(
            directory.path(),
            &["balancer", "--budget", "4G", "--beside-others", "--interval", "100ms"],
        )
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
        top.wait_for("host normal");
        if sudden {
            balancer.kill().unwrap();
        } else {
            let pid = Pid::from_raw(balancer.id().try_into().unwrap()).unwrap();
            kill_process(pid, Signal::TERM).unwrap();
        }
        balancer.wait().unwrap();
        top.wait_for("no balancer runs");
    }
    top.press("q");
    top.assert_over("q");
}

#[test]
fn without_a_terminal_it_prints_text_or_json() {
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let _vm = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(100));
    let output = |arguments: &[&str]| {
        let output = ballast(directory.path(), arguments).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text, String::from_utf8(output.stderr).unwrap())
    };
    let (code, text, error) = output(&["top"]);
    assert_eq!((code, text.as_str()), (Some(2), ""));
    assert!(error.contains("--once or --json"), "{error}");
    let (code, text, _) = output(&["top", "--once"]);
    assert_eq!(code, Some(0));
    let row = text.lines().find(|line| line.starts_with("web ")).unwrap();
    assert!(row.contains("not balanced") && row.contains("100 MiB"), "{row}");
    assert!(text.contains("web: no balancer runs"), "{text}");
    let (code, text, _) = output(&["top", "--once", "--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &json["vms"][0]["name"]), (Some(0), &Value::from("web")));
    assert_eq!(json["vms"][0]["memory"]["used"], 100 << 20);
    let (code, _, error) = output(&["top", "--interval", "1ms"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("100ms to 1h"), "{error}");
    // A line at each interval, until the reader has seen enough.
    let mut stream = ballast(directory.path(), &["top", "--json", "--interval", "100ms"]);
    let mut stream = stream.stdout(Stdio::piped()).spawn().unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(stream.stdout.take().unwrap()));
    for line in lines.take(3) {
        let json: Value = serde_json::from_str(&line.unwrap()).unwrap();
        assert_eq!(json["source"]["from"], "vms");
    }
    assert_eq!(stream.wait().unwrap().code(), Some(0));
}

/// Not a test: VMs that change, for a look at the screen by hand.
///
/// `BALLAST_TEST_LOOK=1 cargo test -p cli --test top -- --nocapture a_place_to_look`
#[test]
fn a_place_to_look() {
    if std::env::var_os("BALLAST_TEST_LOOK").is_none() {
        return;
    }
    let runtime = runtime();
    let _guard = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    println!("BALLAST_RUNTIME_DIR={}", directory.path().display());
    let limits = "256M,min=128M,max=1G";
    let vms: Vec<FakeVm> = (0..200)
        .map(|n| FakeVm::start(directory.path(), &format!("vm-{n:03}"), limits, Bytes::mib(100)))
        .collect();
    for second in 0_u64.. {
        for (n, vm) in vms.iter().enumerate() {
            let phase = (second as f64 / 20.0 + n as f64).sin();
            vm.state().used = Bytes::mib((300.0 + 200.0 * phase) as u64);
        }
        thread::sleep(Duration::from_secs(1));
    }
}
