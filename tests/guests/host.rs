//! What a test asks for: a host whose KVM can boot stock kernels.

use std::env;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use api::units::Bytes;
use lab::{Emulator, Execution, Kernel, inside};

use crate::ballast;
use crate::qemu::qemu_with_libraries;

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
