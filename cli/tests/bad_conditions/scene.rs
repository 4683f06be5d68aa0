//! Where a command runs.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm::api_server::Server;
use vmm::control::Control;
use vmm_sys_util::eventfd::EventFd;

use crate::conditions::{leave_root, output_file};
use crate::log::Daemon;
use crate::samples::Sample;
use crate::{BALLAST, ballast, wait_for};

/// What all scenes of a test share: a VM and a balancer to be found, files to be read.
pub struct Fixture {
    balancer: Daemon,
    files: tempfile::TempDir,
    /// The program, where any user can reach it.
    program: PathBuf,
    _directory: tempfile::TempDir,
    _vm: Vm,
}

/// The API of a VM that has been set up and not started.
struct Vm {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    fn serve(socket: &Path) -> Self {
        let server = Server::bind(socket).unwrap();
        let stop = server.stopper().unwrap();
        let limits = "256M,min=128M,max=1G".parse().unwrap();
        let control = Arc::new(Control::new("web".parse().unwrap(), "2".parse().unwrap(), limits));
        let thread = thread::spawn(move || server.run(&control).unwrap());
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Fixture {
    pub fn new() -> Self {
        let balancer = Daemon::start(|_| {
            let mut command = Command::new(BALLAST);
            let arguments = ["balancer", "--interval", "50ms", "--budget", "64M", "--beside-others"];
            command.args(arguments).stderr(Stdio::null());
            command
        });
        let vm = Vm::serve(&balancer.directory().join("web.sock"));
        wait_for("VM that the balancer knows", || {
            let mut why = Command::new(BALLAST);
            why.args(["why", "web"]).env("BALLAST_RUNTIME_DIR", balancer.directory());
            why.output().unwrap().status.success().then_some(())
        });
        let files = tempfile::tempdir().unwrap();
        fs::write(files.path().join("vmlinuz"), "no kernel").unwrap();
        fs::write(files.path().join("vm.toml"), "kernel = 'vmlinuz'\nmemory = '64M'\n").unwrap();
        fs::write(files.path().join("initrd"), "nothing").unwrap();
        fs::write(files.path().join("balancer.toml"), "interval = \"1s\"\n").unwrap();
        fs::write(files.path().join("disk.img"), [0; 4096]).unwrap();
        let run = files.path().join("run.json");
        let words = "slat run --payload warm-touch --passes 1 --rounds 1 --output";
        let words: Vec<&str> = words.split(' ').chain([run.to_str().unwrap()]).collect();
        let measured = ballast(&words);
        assert!(run.is_file(), "{measured:?}");
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o711)).unwrap();
        let program = directory.path().join("ballast");
        fs::hard_link(BALLAST, &program).or_else(|_| fs::copy(BALLAST, &program).map(drop)).unwrap();
        Self { balancer, files, program, _directory: directory, _vm: vm }
    }
}

/// Directories of a command's own.
pub struct Scene {
    root: tempfile::TempDir,
    runtime: PathBuf,
}

impl Scene {
    pub fn new(sample: &Sample, fixture: &Fixture) -> (Self, Command) {
        let root = tempfile::tempdir().unwrap();
        let mut scene = Self { runtime: root.path().join("run"), root };
        for directory in [scene.own_runtime(), scene.work(), scene.temporary()] {
            fs::create_dir(directory).unwrap();
        }
        fs::set_permissions(scene.own_runtime(), Permissions::from_mode(0o700)).unwrap();
        for file in fs::read_dir(fixture.files.path()).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), scene.work().join(file.file_name())).unwrap();
        }
        let mut command = Command::new(&fixture.program);
        let words = sample.command.split(' ').chain(sample.arguments.split(' '));
        command.args(words.filter(|word| !word.is_empty())).current_dir(scene.work()).process_group(0);
        command.env("TMPDIR", scene.temporary()).env_remove("BALLAST_LOG").env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::null()).stdout(output_file(&scene)).stderr(Stdio::piped());
        let runtime =
            if sample.finds { fixture.balancer.directory().to_owned() } else { scene.own_runtime() };
        scene.set_runtime(&mut command, runtime);
        (scene, command)
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn work(&self) -> PathBuf {
        self.root().join("work")
    }

    pub fn temporary(&self) -> PathBuf {
        self.root().join("tmp")
    }

    /// Where standard output goes.
    pub fn output(&self) -> PathBuf {
        self.root().join("output")
    }

    /// The runtime directory of this scene, which its command may have been given.
    pub fn own_runtime(&self) -> PathBuf {
        self.root().join("run")
    }

    /// The one that it has been given.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    pub fn set_runtime(&mut self, command: &mut Command, path: PathBuf) {
        command.env("BALLAST_RUNTIME_DIR", &path);
        self.runtime = path;
    }

    /// Has another user than root run the command, who can reach it and owns this scene.
    pub fn leave_root(&mut self, command: &mut Command) {
        fs::set_permissions(self.root(), Permissions::from_mode(0o711)).unwrap();
        let (run, work, temporary) = (self.own_runtime(), self.work(), self.temporary());
        leave_root(command, &[self.root(), &run, &work, &temporary]);
    }
}
