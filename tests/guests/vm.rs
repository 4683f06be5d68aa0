//! A real VM in a test: `ballast run` with its console, its API and its memory on the host.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use api::client::{Client, Error};
use api::runtime;
use api::status::{MemoryStatus, VmStatus};
use api::units::Bytes;
use lab::GuestImages;

use crate::lines::{Lines, Printed};
use crate::smaps::{Of, sum};
use crate::{ballast, block_on};

/// A wait gives up after this many times what it usually takes.
const PATIENCE: u32 = 10;
/// How often a wait looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long one answer of the API may take on an emulated host.
const ANSWER: Duration = Duration::from_secs(20);

/// How long a guest usually takes to boot in an emulated host.
pub const BOOT: Duration = Duration::from_secs(15);

/// Waits until `look` finds something.
///
/// # Panics
/// After ten times what it `usually` takes, with `what` was waited for.
pub fn wait_for<T>(what: &str, usually: Duration, look: impl FnMut() -> Option<T>) -> T {
    wait_looking_every(LOOK_AGAIN, what, usually, look)
}

/// The same for those who measure when it comes: looks again after `pause`.
///
/// # Panics
/// As [`wait_for`].
pub fn wait_looking_every<T>(
    pause: Duration,
    what: &str,
    usually: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            start.elapsed() < usually * PATIENCE,
            "gave up after {:?} waiting for {what}",
            start.elapsed()
        );
        thread::sleep(pause);
    }
}

/// How a VM is started.
#[derive(Clone, Debug)]
pub struct VmSettings {
    /// Its name.
    pub name: String,
    /// What it boots.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// A disk that it boots instead, by that alone.
    pub disk: Option<String>,
    /// `--memory`.
    pub memory: String,
    /// What stands on the kernel's command line behind `console=ttyS0 panic=-1 quiet`.
    pub cmdline: String,
    /// Whether it stands behind ballast's own default instead.
    pub defaults: bool,
    /// Further arguments of `ballast run`.
    pub arguments: Vec<String>,
    /// Whether what it says is printed.
    pub printed: Printed,
}

impl VmSettings {
    /// A guest of the lab that boots Debian's bzImage.
    pub fn new(name: &str, images: &GuestImages, memory: &str, cmdline: &str) -> Self {
        Self {
            name: name.to_owned(),
            kernel: images.bzimage.clone(),
            initrd: images.initrd.clone(),
            disk: None,
            memory: memory.to_owned(),
            cmdline: cmdline.to_owned(),
            defaults: false,
            arguments: Vec::new(),
            printed: Printed::Yes,
        }
    }

    /// Prints nothing of what it says.
    pub fn quiet(mut self) -> Self {
        self.printed = Printed::No;
        self
    }

    /// Boots with ballast's default command line in front of its own words.
    pub fn by_default(mut self) -> Self {
        self.defaults = true;
        self
    }

    /// Boots another kernel.
    pub fn kernel(mut self, kernel: &Path) -> Self {
        self.kernel = kernel.to_owned();
        self
    }

    /// Boots what this disk has.
    pub fn disk(mut self, spec: &str) -> Self {
        self.disk = Some(spec.to_owned());
        self
    }

    /// Has the guest run the agent.
    pub fn agent(mut self, images: &GuestImages) -> Self {
        self.initrd = images.agent_initrd.clone();
        self.cmdline.push_str(" ballast.agent");
        self
    }

    /// Adds arguments of `ballast run`.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// Where `ballast` can't be run.
    pub fn start(&self) -> Vm {
        let mut command = Command::new(ballast());
        command.args(["run", "--name", &self.name, "--memory", &self.memory]);
        match &self.disk {
            Some(disk) => command.args(["--disk", disk]),
            None => command.arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd),
        };
        if self.defaults {
            command.args(["--append", &self.cmdline]);
        } else {
            command.args(["--cmdline", &format!("console=ttyS0 panic=-1 quiet {}", self.cmdline)]);
        }
        command.args(&self.arguments);
        Vm::spawn(&self.name, command, self.printed)
    }

    /// Writes these settings to `file` and starts it from there, as a service manager that listens at `manager` does.
    /// Its further arguments are given on the command line.
    ///
    /// # Panics
    /// Where the file can't be written, or `ballast` can't be run.
    pub fn start_as_service(&self, file: &Path, manager: &Path) -> Vm {
        let lines = [
            ("name", self.name.clone()),
            ("memory", self.memory.clone()),
            ("kernel", self.kernel.display().to_string()),
            ("initrd", self.initrd.display().to_string()),
            ("append", self.cmdline.clone()),
        ];
        let text: String = lines.iter().map(|(key, value)| format!("{key} = {value:?}\n")).collect();
        fs::write(file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut command = Command::new(ballast());
        command.args(["run", "--config"]).arg(file).args(&self.arguments).env("NOTIFY_SOCKET", manager);
        Vm::spawn(&self.name, command, self.printed)
    }
}

/// A VM that runs. It is killed where a test drops it.
pub struct Vm {
    name: String,
    child: Child,
    input: ChildStdin,
    console: Lines,
    seen: usize,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let refused = self.console.find(0, "the sandbox refused");
        assert!(refused.is_none() || thread::panicking(), "{}: {refused:?}", self.name);
    }
}

impl Vm {
    /// Starts any VMM whose guest's console is its standard input and output.
    pub(crate) fn spawn(name: &str, mut command: Command, printed: Printed) -> Self {
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?} can't be run: {error}"));
        let console = Lines::default();
        let output = child.stdout.take().expect("it is piped");
        let errors = child.stderr.take().expect("it is piped");
        console.follow(output, &format!("{name}| "), printed);
        console.follow(errors, &format!("{name}! "), printed);
        let input = child.stdin.take().expect("it is piped");
        Self { name: name.to_owned(), child, input, console, seen: 0 }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains `text`, behind the last one that was waited for.
    ///
    /// # Panics
    /// Where it does not come, or the VM ends first.
    pub fn wait_for_line(&mut self, text: &str, usually: Duration) -> String {
        let what = format!("`{text}` on the console of {}", self.name);
        let mut ended_before = false;
        let (number, line) = wait_for(&what, usually, || {
            let found = self.console.find(self.seen, text);
            // Its last lines may come in after its end was seen: one more look.
            assert!(found.is_some() || !ended_before, "{} ended while a test waited for {what}", self.name);
            ended_before = self.child.try_wait().is_ok_and(|status| status.is_some());
            found
        });
        self.seen = number + 1;
        line
    }

    /// A line that contains `text`, behind the last one that was waited for, if it is there already.
    pub fn line(&self, text: &str) -> Option<String> {
        self.console.find(self.seen, text).map(|(_, line)| line)
    }

    /// When a line with `text` came first.
    pub fn heard(&self, text: &str) -> Option<Instant> {
        self.console.when(|_, line| line.contains(text)).first().copied()
    }

    /// Waits until the guest's init has loaded its modules; gives its `READY` line.
    ///
    /// # Panics
    /// As [`Vm::wait_for_line`].
    pub fn wait_until_ready(&mut self) -> String {
        self.wait_for_line("READY", BOOT)
    }

    /// Types on the console.
    ///
    /// # Panics
    /// Where the VM has ended.
    pub fn type_in(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).and_then(|()| self.input.flush()).expect("the VM takes input");
    }

    /// Has the guest do one step of a load (see the guest's init) and waits until it is done.
    ///
    /// # Panics
    /// Where the guest does not say so.
    pub fn step(&mut self, step: &str, usually: Duration) {
        self.type_in(&format!("{step}\n"));
        self.wait_for_line(&format!("DONE {step}"), usually);
    }

    /// Waits for the process's end and gives its exit code.
    ///
    /// # Panics
    /// Where it does not end, or a signal ended it.
    pub fn wait_for_end(&mut self, usually: Duration) -> i32 {
        let what = format!("the end of {}", self.name);
        let status = wait_for(&what, usually, || self.child.try_wait().expect("the child is ours"));
        status.code().unwrap_or_else(|| panic!("{} was ended by a signal: {status}", self.name))
    }

    /// Asks the process to end, with SIGTERM.
    ///
    /// # Panics
    /// Where the system refuses.
    pub fn terminate(&self) {
        let signal = rustix::process::Signal::TERM;
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .expect("a child can be sent a signal");
    }

    /// Kills the process with SIGKILL.
    ///
    /// # Panics
    /// Where the system refuses.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Asks something of the API.
    ///
    /// # Errors
    /// As the API answers.
    pub fn ask<T>(&self, question: impl AsyncFnOnce(&mut Client) -> Result<T, Error>) -> Result<T, Error> {
        let socket = runtime::socket(&self.name).expect("there is a runtime directory");
        block_on(question(&mut Client::new(socket).with_timeout(ANSWER)))
    }

    /// `GET /vm`.
    ///
    /// # Panics
    /// Where there is no answer.
    pub fn status(&self) -> VmStatus {
        self.ask(async |client| client.status().await).expect("the VM tells its status")
    }

    /// `GET /memory`.
    ///
    /// # Panics
    /// Where there is no answer.
    pub fn memory(&self) -> MemoryStatus {
        self.ask(async |client| client.memory().await).expect("the VM tells its memory")
    }

    /// Waits until the VM's memory is as `fits` says.
    ///
    /// # Panics
    /// Where it never is.
    pub fn wait_for_memory(
        &self,
        what: &str,
        usually: Duration,
        mut fits: impl FnMut(&MemoryStatus) -> bool,
    ) -> MemoryStatus {
        let mut last = None;
        let start = Instant::now();
        loop {
            let memory = self.memory();
            if fits(&memory) {
                return memory;
            }
            assert!(
                start.elapsed() < usually * PATIENCE,
                "gave up after {:?} waiting for {what}; last was {last:#?}",
                start.elapsed()
            );
            last = Some(memory);
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// `PUT /memory/target`.
    ///
    /// # Panics
    /// Where it is refused.
    pub fn set_target(&self, target: Bytes) {
        self.ask(async |client| client.set_target(target).await).expect("the target is taken");
    }

    /// Guest memory that the host holds, as `/proc/PID/smaps` says: the kernel's own
    /// word, to hold the API's against. Reserved huge pages count as well.
    ///
    /// # Panics
    /// Where the VM has ended.
    pub fn rss_by_kernel(&self) -> Bytes {
        sum(&self.smaps(), Of::Guest, &["Rss", "Private_Hugetlb", "Shared_Hugetlb"])
    }

    /// `/proc/PID/smaps`.
    ///
    /// # Panics
    /// Where the VM has ended.
    pub fn smaps(&self) -> String {
        fs::read_to_string(format!("/proc/{}/smaps", self.pid())).expect("the VM runs")
    }
}
