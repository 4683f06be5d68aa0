//! What a test asks for: a host whose KVM can boot stock kernels.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use api::units::Bytes;
use lab::{Emulator, Execution, Kernel, Vendor, inside};
use rustix::mount::{mount_bind_recursive, mount_move};
use rustix::process::{chdir, chroot};

use crate::ballast;
use crate::qemu::{qemu_with_libraries, with_libraries};

/// A wait gives up after this many times what it usually takes.
const PATIENCE: u32 = 10;

/// A host for one test.
#[derive(Clone, Debug)]
pub struct Host {
    emulator: Emulator,
    usual: Duration,
}

impl Default for Host {
    fn default() -> Self {
        Self { emulator: Emulator::default(), usual: Duration::from_secs(60) }
    }
}

impl Host {
    /// One CPU, 2 GiB, nested paging.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether KVM uses nested paging (`true`) or shadow paging. A real host uses what it has.
    pub fn nested_paging(mut self, on: bool) -> Self {
        self.emulator.nested_paging = on;
        self
    }

    /// An emulated host is by Intel (in Bochs), where others are by AMD (in QEMU). A real host is whose it is.
    pub fn intel(mut self) -> Self {
        self.emulator.vendor = Vendor::Intel;
        self
    }

    /// A parameter of the vendor's KVM module in an emulated host, with its value.
    pub fn parameter(mut self, name: &str, value: &str) -> Self {
        self.emulator.module_parameters.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Puts the unit tests of one of this tree's libraries into the emulated host, for [`unit_tests`].
    ///
    /// # Panics
    /// Where they can't be built.
    pub fn unit_tests(mut self, package: &str) -> Self {
        if !inside() {
            let program = lab::unit_tests(package).unwrap_or_else(|error| panic!("{error}"));
            self.emulator.files.push((program, unit_tests_inside(package)));
        }
        self
    }

    /// Emulated processors.
    pub fn cpus(mut self, count: usize) -> Self {
        self.emulator.cpus = count;
        self
    }

    /// Memory of the emulated host.
    pub fn memory(mut self, memory: Bytes) -> Self {
        self.emulator.memory = memory;
        self
    }

    /// A kernel that guests of the test boot.
    pub fn guest(mut self, kernel: Kernel) -> Self {
        self.emulator.guests.push(kernel);
        self
    }

    /// As [`Host::guest`], with what guests with networks boot into.
    ///
    /// # Panics
    /// Where that can't be made.
    pub fn net_guest(mut self, kernel: Kernel) -> Self {
        if !inside() {
            let initrd = kernel.net_initrd().unwrap_or_else(|error| panic!("{error}"));
            let path_inside = kernel.net_initrd_inside().to_string_lossy().into_owned();
            self.emulator.files.push((initrd, path_inside));
        }
        self.guest(kernel)
    }

    /// Puts this machine's QEMU into the emulated host, for VMs beside ballast's.
    ///
    /// # Panics
    /// Where it is not installed.
    pub fn qemu(mut self) -> Self {
        if !inside() {
            self.emulator.files.extend(qemu_with_libraries().expect("QEMU is installed"));
        }
        self
    }

    /// Puts a file of this machine into the emulated host.
    pub fn file(mut self, path: &Path, path_inside: &Path) -> Self {
        self.emulator.files.push((path.to_owned(), path_inside.to_string_lossy().into_owned()));
        self
    }

    /// Loads these modules of the host's kernel too. A real host has what it has.
    pub fn modules(mut self, names: &[&'static str]) -> Self {
        self.emulator.modules.extend(names);
        self
    }

    /// Puts this machine's passt into the emulated host.
    ///
    /// # Panics
    /// Where it is not installed.
    pub fn passt(self) -> Self {
        self.program("/usr/bin/passt", "passt").program("/usr/bin/passt.avx2", "passt")
    }

    /// Puts a program of this machine's, of the package `package`, into the emulated host.
    ///
    /// # Panics
    /// Where it is not installed.
    pub fn program(mut self, path: &str, package: &str) -> Self {
        if !inside() {
            self.emulator.files.extend(with_libraries(path, package).expect("it is installed"));
        }
        self
    }

    /// Puts files of this machine into the emulated host, each at its place.
    pub fn files(mut self, files: Vec<(PathBuf, String)>) -> Self {
        if !inside() {
            self.emulator.files.extend(files);
        }
        self
    }

    /// How long the test usually takes in an emulated host. It gives up after ten times that.
    pub fn usually(mut self, time: Duration) -> Self {
        self.usual = time;
        self
    }

    /// Counts instructions as time: what the test does, it does the same each time. On a real host
    /// this has no effect.
    pub fn deterministic(mut self) -> Self {
        self.emulator.execution = Execution::Counted;
        self.emulator.attempts = 2;
        self
    }

    /// KVM lets a halted guest be, which has an emulated host's idle time pass quickly. On a real
    /// host this has no effect.
    pub fn without_halt_polling(mut self) -> Self {
        self.emulator.halt_polling = false;
        self
    }

    /// Hands these variables on to the emulated host, where they are set here.
    pub fn with_variables(mut self, names: &[&str]) -> Self {
        let set = names.iter().filter_map(|&name| Some((name.to_owned(), env::var(name).ok()?)));
        self.emulator.environment.extend(set);
        self
    }

    /// Runs the body of a test on such a host. To be called directly in the test's
    /// function: the emulated host finds the test by the closure's name.
    ///
    /// # Panics
    /// Where the body does, or where the host can't be made.
    pub fn run<F: FnOnce()>(mut self, body: F) {
        if inside() || kvm_boots_stock_kernels() {
            return body();
        }
        let name = test_name::<F>();
        self.emulator.limit = self.usual * PATIENCE;
        let program = env::current_exe().expect("a test knows its own file");
        match self
            .emulator
            .run(&program, &["--exact", &name, "--include-ignored", "--nocapture", "--test-threads=1"])
        {
            Ok(outcome) => {
                assert_eq!(outcome.code, 0, "{name} failed in the emulated host; see its output above")
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

/// Where a library's unit tests lie in an emulated host.
fn unit_tests_inside(package: &str) -> String {
    format!("/lab/unit-tests-{package}")
}

/// Runs unit tests that [`Host::unit_tests`] has put into an emulated host; none on a real one, where they run by
/// themselves.
///
/// # Panics
/// Where one fails.
pub fn unit_tests(package: &str, tests: &[&str]) {
    if !inside() {
        return;
    }
    let mut program = Command::new(unit_tests_inside(package));
    let status = program.args(["--test-threads=1", "--nocapture"]).args(tests).status();
    let status = status.expect("the unit tests were put there");
    assert!(status.success(), "{package}: {status}; see the output above");
}

/// `boots::powers_off::{{closure}}` is the test `powers_off` of the program `boots`.
fn test_name<F>() -> String {
    let path = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    path.split_once("::").map_or(path, |(_, name)| name).to_owned()
}

/// Whether this machine's own KVM runs stock kernels, as `ballast check` finds.
pub fn kvm_boots_stock_kernels() -> bool {
    let kvm = || File::options().read(true).write(true).open("/dev/kvm");
    if env::var_os("BALLAST_LAB_EMULATE").is_some() || kvm().is_err() {
        return false;
    }
    Command::new(ballast()).arg("check").output().is_ok_and(|output| output.status.success())
}

/// Makes room for passt in an emulated host: it changes its root, which it can't where the root is the kernel's
/// first one.
///
/// # Panics
/// Where this is not root, or the host refuses.
pub fn leave_the_first_root() {
    fs::create_dir_all("/root-of-tests").expect("a directory");
    mount_bind_recursive("/", "/root-of-tests").expect("the host mounts it");
    // Moved to the root of all mounts, as the kernel lets nobody who merely changed its root have a user namespace.
    chdir("/root-of-tests").expect("it is there");
    mount_move(".", "/").expect("the host moves it");
    chroot(".").and_then(|()| chdir("/")).expect("this is root");
}
