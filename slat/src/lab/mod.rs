//! SLAT on and off in throw-away emulated hosts.
//!
//! QEMU's software emulation has AMD's SVM with nested paging. A Debian kernel
//! boots in it as a host, loads `kvm-amd` with `npt=1` or `npt=0`, and this
//! same program runs there as the first process. Nothing of the real host is
//! touched: no module, no setting, not even /dev/kvm.

pub mod archive;
pub mod inside;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::figure::short;
use crate::linux;
use crate::run::{Measurement, Run, cell};
use archive::Archive;

/// Modules of an emulated host, in the order of loading.
const MODULE_FILES: [&str; 3] =
    ["kernel/virt/lib/irqbypass.ko", "kernel/arch/x86/kvm/kvm.ko", "kernel/arch/x86/kvm/kvm-amd.ko"];
const EMULATOR: &str = "qemu-system-x86_64";
/// Emulated CPUs, all of them on one thread: exits are exact, and time says nothing of contention.
const SCALING_CPUS: &str = "4";

/// Why the lab gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kernel to boot.
    #[error(
        "no kernel with kvm-amd below {0}: install linux-image-cloud-amd64, or unpack it anywhere with \
         `apt-get download` and `dpkg -x` and name the directory with --kernel-root"
    )]
    NoKernel(PathBuf),
    /// No emulator.
    #[error("cannot start {EMULATOR}: {0}; install the package qemu-system-x86")]
    NoEmulator(io::Error),
    /// Something with files.
    #[error("{what}: {source}")]
    Files {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The emulated host did not answer.
    #[error("the emulated host gave no result {0}; its last words:\n{1}")]
    NoResult(String, String),
    /// The user asked to stop.
    #[error("stopped before the emulated hosts were done")]
    Interrupted,
}

fn files(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Files { what, source }
}

/// A kernel and its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The first kernel below `root` (in `boot` and `lib/modules`) that has the modules; Debian's cloud
    /// kernels before others, older before newer: counts are compared with those of 6.1.
    ///
    /// # Errors
    /// [`Error::NoKernel`].
    pub fn find(root: &Path) -> Result<Self, Error> {
        let none = || Error::NoKernel(root.to_owned());
        let mut releases: Vec<String> = fs::read_dir(root.join("lib/modules"))
            .map_err(|_| none())?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .collect();
        releases.sort_by_key(|r| (!r.contains("cloud"), numbers(r)));
        releases
            .into_iter()
            .map(|release| Self {
                image: root.join("boot").join(format!("vmlinuz-{release}")),
                modules: root.join("lib/modules").join(release),
            })
            .find(|k| k.image.is_file() && MODULE_FILES.iter().all(|m| k.modules.join(m).is_file()))
            .ok_or_else(none)
    }
}

/// The numbers in a release, so that 6.12 comes after 6.1.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// How an emulated host's KVM translates a guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// `npt=1`: SLAT.
    Nested,
    /// `npt=1` and `tdp_mmu=0`: SLAT by the code that also does shadow paging. What is left of the difference
    /// to [`Paging::Shadow`] is SLAT's own.
    NestedOldMmu,
    /// `npt=0`: shadow paging.
    Shadow,
}

impl Paging {
    const fn words(self) -> &'static str {
        match self {
            Self::Nested => "npt=1",
            Self::NestedOldMmu => "npt=1 tdp_mmu=0",
            Self::Shadow => "npt=0",
        }
    }
}

/// What an emulated host is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Payloads and a Linux guest's workloads, counted: one CPU, the same to the bit each time.
    Count,
    /// KVM's memory for a guest, counted.
    Memory,
    /// More and more Linux guests, on the same clock.
    Density,
    /// Page-table work on more and more vCPUs, and a Linux guest's exits by reason; in emulated time.
    Scale,
}

impl Errand {
    const fn words(self) -> &'static str {
        match self {
            Self::Count => "counting",
            Self::Memory => "memory",
            Self::Density => "density",
            Self::Scale => "vCPUs and reasons",
        }
    }

    /// The set of payloads and the guests' work, as the hidden command takes them.
    const fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Count => ["lab", "workloads"],
            Self::Memory => ["memory", "none"],
            Self::Density => ["guests", "density"],
            Self::Scale => ["scaling", "reasons"],
        }
    }

    /// Whether the clock counts instructions.
    const fn is_counted(self) -> bool {
        !matches!(self, Self::Scale)
    }
}

/// One emulated host.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// SLAT on or off.
    pub paging: Paging,
    /// What it is for.
    pub errand: Errand,
    /// How long it may take.
    pub limit: Duration,
}

/// SLAT on and off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// `npt=1`.
    pub on: Run,
    /// `npt=0`.
    pub off: Run,
}

/// What one visit to the lab found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// Counts and instructions, the same each time.
    pub counted: Pair,
    /// Page-table work on more and more vCPUs, in emulated time.
    pub scaling: Pair,
    /// KVM's memory with SLAT on and `kvm.tdp_mmu=0`.
    #[serde(default)]
    pub old_mmu: Option<Run>,
    /// How many sessions fit.
    #[serde(default)]
    pub density: Option<Pair>,
    /// Whether everything was counted twice.
    pub twice: bool,
    /// Where two deterministic runs differ; `None` where they are identical or there was only one.
    pub difference: Option<String>,
}

/// What to do in the lab.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// Count everything twice and compare.
    pub twice: bool,
    /// Add guests until they answer too late.
    pub density: bool,
    /// How long one emulated host may take.
    pub limit: Duration,
}

impl Visit {
    /// Runs SLAT on and off, counting; then memory, the scaling over vCPUs, and density where asked for.
    ///
    /// # Errors
    /// Where an emulated host gives nothing, or the user stops it.
    pub fn run(
        self,
        kernel: &Kernel,
        stop: &AtomicBool,
        mut progress: impl FnMut(&str),
    ) -> Result<Findings, Error> {
        let mut host = |paging: Paging, errand: Errand, round: &str| {
            progress(&format!("{}, {}{round}", errand.words(), paging.words()));
            Host { paging, errand, limit: self.limit }.run(kernel, stop)
        };
        let mut pair = |errand, round: &str| {
            let on = host(Paging::Nested, errand, round)?;
            Ok::<_, Error>(Pair { on, off: host(Paging::Shadow, errand, round)? })
        };
        let counted = pair(Errand::Count, "")?;
        let again = if self.twice { Some(pair(Errand::Count, ", again")?) } else { None };
        let scaling = pair(Errand::Scale, "")?;
        let density = if self.density { Some(pair(Errand::Density, "")?) } else { None };
        let old_mmu = Some(host(Paging::NestedOldMmu, Errand::Memory, "")?);
        let difference = again.and_then(|again| {
            difference(&counted.on, &again.on).or_else(|| difference(&counted.off, &again.off))
        });
        Ok(Findings { counted, scaling, old_mmu, density, twice: self.twice, difference })
    }
}

/// The first measurement in which two deterministic runs differ.
fn difference(first: &Run, second: &Run) -> Option<String> {
    if first == second {
        return None;
    }
    let pairs = first.measurements.iter().zip(&second.measurements);
    let differing = pairs.into_iter().find(|(a, b)| a != b);
    if let (None, Some((a, b))) = (differing, first.linux.iter().zip(&second.linux).find(|(a, b)| a != b)) {
        return Some(format!("two deterministic runs differ in a Linux guest: {a:?} and {b:?}"));
    }
    Some(differing.map_or_else(
        || "two deterministic runs differ in what the host is".into(),
        |(a, b)| {
            format!(
                "two deterministic runs differ in {}: {} and {} exits an operation, {} and {} instructions",
                a.setup.describe(),
                cell(&a.exits),
                cell(&b.exits),
                cell(&a.time),
                cell(&b.time)
            )
        },
    ))
}

impl Pair {
    /// The Linux guest's workloads that ran with SLAT on and off, in that order.
    pub fn workloads(&self) -> impl Iterator<Item = (&linux::Workload, &linux::Workload)> {
        let off = |on: &linux::Workload| self.off.linux.iter().find(|off| off.name == on.name);
        self.on.linux.iter().filter_map(move |on| Some((on, off(on)?)))
    }
}

impl Findings {
    /// Why Linux guests gave nothing, where they should have.
    pub fn failures(&self) -> impl Iterator<Item = &String> {
        let pairs = [Some(&self.counted), Some(&self.scaling), self.density.as_ref()];
        let runs = pairs.into_iter().flatten().flat_map(|pair| [&pair.on, &pair.off]);
        runs.filter_map(|run| run.linux_failure.as_ref())
    }

    /// Rows for a Linux guest's workloads: name, exits on and off, instructions on and off, off over on.
    pub fn linux_rows(&self) -> Vec<[String; 6]> {
        let exits = |w: &linux::Workload| w.exits.map_or("-".into(), short);
        self.counted
            .workloads()
            .map(|(a, b)| {
                let factor = format!("{:.3}", b.ticks / a.ticks.max(1.0));
                [a.name.clone(), exits(a), exits(b), short(a.ticks), short(b.ticks), factor]
            })
            .collect()
    }

    /// Rows for why a Linux guest left: workload, reasons with SLAT on, and off, the most frequent first.
    pub fn reason_rows(&self) -> Vec<[String; 3]> {
        let list = |workload: &linux::Workload| {
            let mut reasons: Vec<_> = workload.reasons.iter().collect();
            reasons.sort_by(|a, b| b.1.total_cmp(a.1).then(a.0.cmp(b.0)));
            let words: Vec<_> =
                reasons.iter().take(5).map(|(reason, each)| format!("{reason} {}", short(**each))).collect();
            if words.is_empty() { "none".to_owned() } else { words.join(", ") }
        };
        let traced = |(on, off): &(&linux::Workload, &linux::Workload)| {
            !on.reasons.is_empty() || !off.reasons.is_empty()
        };
        self.scaling
            .workloads()
            .filter(traced)
            .map(|(on, off)| [on.name.clone(), list(on), list(off)])
            .collect()
    }

    /// Rows for a table: setup, exits on and off, instructions on and off, note.
    pub fn rows(&self) -> Vec<[String; 6]> {
        let on = &self.counted.on.measurements;
        let row = |on: &Measurement| {
            let off = self.counted.off.find(&on.setup)?;
            let note = on.failure.clone().or_else(|| off.failure.clone()).unwrap_or_default();
            let (exits, time) = (|m: &Measurement| cell(&m.exits), |m: &Measurement| cell(&m.time));
            Some([on.setup.describe(), exits(on), exits(off), time(on), time(off), note])
        };
        on.iter().filter_map(row).collect()
    }
}

impl Host {
    /// What runs inside.
    fn arguments(&self) -> Vec<&'static str> {
        let [set, guests] = self.errand.arguments();
        let mut arguments = vec!["slat", "inside", "--set", set, "--guests", guests];
        if self.paging != Paging::Shadow {
            arguments.push("--nested-paging");
        }
        if self.paging == Paging::NestedOldMmu {
            arguments.push("--no-tdp-mmu");
        }
        if self.errand.is_counted() {
            arguments.push("--instructions");
        }
        arguments
    }

    fn command(&self, kernel: &Kernel, directory: &Path) -> Command {
        let mut command = Command::new(EMULATOR);
        let counted = self.errand.is_counted();
        let processor = if counted { "EPYC,+svm,+npt,-rdrand,-rdseed" } else { "EPYC,+svm,+npt" };
        let cpus = if counted { "1" } else { SCALING_CPUS };
        let file = |name: &str| format!("file:{}", directory.join(name).display());
        // QEMU 7.2 breaks hosts and guests where it emulates SVM on several threads at once.
        command
            .args(["-M", "q35", "-accel", "tcg,thread=single", "-cpu", processor, "-m", "2048"])
            .args(["-smp", cpus, "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", &file("console"), "-serial", &file("result"), "-no-reboot"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(directory.join("initrd"));
        let mut line = String::from("console=ttyS0 reboot=t panic=1 quiet tsc=reliable rdinit=/ballast");
        if counted {
            command
                .args(["-icount", "shift=0,sleep=off", "-seed", "1"])
                .args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
            line += " norandmaps random.trust_cpu=off";
        }
        line += " -- ";
        line += &self.arguments().join(" ");
        // The decompressor looks for this word everywhere; the kernel itself doesn't know it
        // and would hand it to the first process in front of all others.
        line += " nokaslr";
        command.arg("-append").arg(line).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Boots the host and waits for its result.
    ///
    /// # Errors
    /// Where it can't be started, gives nothing in time, or gives nonsense.
    pub fn run(&self, kernel: &Kernel, stop: &AtomicBool) -> Result<Run, Error> {
        let directory = tempfile::tempdir().map_err(files("a temporary directory"))?;
        let initrd = directory.path().join("initrd");
        fs::write(&initrd, image(kernel, self.errand != Errand::Memory)?)
            .map_err(files("the emulated host's initramfs"))?;
        let mut child = self.command(kernel, directory.path()).spawn().map_err(Error::NoEmulator)?;
        let ended = wait(&mut child, self.limit, stop);
        let read = |name| fs::read_to_string(directory.path().join(name)).unwrap_or_default();
        let reason = match ended {
            Ended::Interrupted => return Err(Error::Interrupted),
            Ended::TooLate => format!("within {} s", self.limit.as_secs()),
            Ended::Left(words) => format!("and left ({})", words.trim()),
        };
        let result = read("result");
        serde_json::from_str(&result).map_err(|e| {
            let console = read("console");
            let from = console.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
            let words = console.get(from..).unwrap_or_default().to_owned();
            Error::NoResult(format!("{reason}: {e}"), words)
        })
    }
}

enum Ended {
    Left(String),
    TooLate,
    Interrupted,
}

fn wait(child: &mut Child, limit: Duration, stop: &AtomicBool) -> Ended {
    let deadline = Instant::now() + limit;
    let ended = loop {
        if let Ok(Some(_)) | Err(_) = child.try_wait() {
            let mut words = String::new();
            if let Some(mut errors) = child.stderr.take() {
                let _ = io::Read::read_to_string(&mut errors, &mut words);
            }
            return Ended::Left(words);
        }
        if stop.load(Ordering::SeqCst) {
            break Ended::Interrupted;
        }
        if Instant::now() >= deadline {
            break Ended::TooLate;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let _ = child.kill();
    let _ = child.wait();
    ended
}

/// The emulated host's initramfs: this program, KVM's modules, a console.
fn image(kernel: &Kernel, linux: bool) -> Result<Vec<u8>, Error> {
    let this = std::env::current_exe().map_err(files("this program's own file"))?;
    let read = |path: &Path| fs::read(path).map_err(files(path.display().to_string()));
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", inside::MODULES] {
        archive.directory(directory);
    }
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    archive.file("ballast", &read(&this)?);
    for (number, module) in MODULE_FILES.iter().enumerate() {
        let path = kernel.modules.join(module);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.file(&format!("{}/{number}-{name}", inside::MODULES), &read(&path)?);
    }
    if linux {
        archive.directory("guest");
        archive.file(linux::KERNEL.trim_start_matches('/'), &read(&kernel.image)?);
        archive.file(linux::INITRD.trim_start_matches('/'), &guest_image(&read(&this)?));
    }
    Ok(archive.finish())
}

/// A Linux guest's initramfs: this program, one to execute, a console.
fn guest_image(this: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    archive.file("ballast", this);
    let (path, program) = linux::guest::program();
    archive.file(path, &program);
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_older_cloud_kernel_first() {
        let root = tempfile::tempdir().expect("a directory");
        assert!(matches!(Kernel::find(root.path()), Err(Error::NoKernel(_))));
        for release in ["6.12.1+deb12-cloud-amd64", "6.1.0-9-cloud-amd64", "5.0.0-amd64"] {
            for module in MODULE_FILES {
                let path = root.path().join("lib/modules").join(release).join(module);
                fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
                fs::write(path, "").expect("a file");
            }
            fs::create_dir_all(root.path().join("boot")).expect("a directory");
            fs::write(root.path().join(format!("boot/vmlinuz-{release}")), "").expect("a file");
        }
        let kernel = Kernel::find(root.path()).expect("a kernel");
        assert!(kernel.image.ends_with("boot/vmlinuz-6.1.0-9-cloud-amd64"), "{kernel:?}");
    }
}
