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

/// One emulated host.
#[derive(Clone, Debug)]
pub struct Host {
    /// SLAT on or off.
    pub nested_paging: bool,
    /// Count instructions instead of time: one CPU, the same to the bit each time.
    pub deterministic: bool,
    /// CPUs; 1 where deterministic.
    pub cpus: u64,
    /// Arguments of `ballast` inside.
    pub arguments: Vec<String>,
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
    /// How long one emulated host may take.
    pub limit: Duration,
}

impl Visit {
    /// Runs SLAT on and off, counting; then the scaling over vCPUs.
    ///
    /// # Errors
    /// Where an emulated host gives nothing, or the user stops it.
    pub fn run(
        self,
        kernel: &Kernel,
        stop: &AtomicBool,
        mut progress: impl FnMut(&str),
    ) -> Result<Findings, Error> {
        let mut pair = |deterministic, round: &str| {
            let mut host = |nested_paging| {
                let what = if deterministic { "counting" } else { "vCPUs" };
                progress(&format!("{what}, npt={}{round}", u8::from(nested_paging)));
                Host::new(nested_paging, deterministic, self.limit).run(kernel, stop)
            };
            Ok::<_, Error>(Pair { on: host(true)?, off: host(false)? })
        };
        let counted = pair(true, "")?;
        let again = if self.twice { Some(pair(true, ", again")?) } else { None };
        let scaling = pair(false, "")?;
        let difference = again.and_then(|again| {
            difference(&counted.on, &again.on).or_else(|| difference(&counted.off, &again.off))
        });
        Ok(Findings { counted, scaling, twice: self.twice, difference })
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
    /// A host with SLAT on or off: one CPU that counts instructions, or four in emulated time.
    pub fn new(nested_paging: bool, deterministic: bool, limit: Duration) -> Self {
        let set = if deterministic { "lab" } else { "scaling" };
        let mut arguments: Vec<String> = ["slat", "inside", "--set", set].map(Into::into).into();
        arguments.extend(nested_paging.then(|| "--nested-paging".into()));
        arguments.extend(deterministic.then(|| "--instructions".into()));
        Self { nested_paging, deterministic, cpus: 4, arguments, limit }
    }

    fn command(&self, kernel: &Kernel, directory: &Path) -> Command {
        let mut command = Command::new(EMULATOR);
        let processor = if self.deterministic { "EPYC,+svm,+npt,-rdrand,-rdseed" } else { "EPYC,+svm,+npt" };
        let cpus = if self.deterministic { 1 } else { self.cpus };
        let file = |name: &str| format!("file:{}", directory.join(name).display());
        command
            .args(["-M", "q35", "-accel", "tcg", "-cpu", processor, "-m", "2048"])
            .args(["-smp", &cpus.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", &file("console"), "-serial", &file("result"), "-no-reboot"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(directory.join("initrd"));
        let mut line = String::from("console=ttyS0 reboot=t panic=1 quiet tsc=reliable rdinit=/ballast");
        if self.deterministic {
            command
                .args(["-icount", "shift=0,sleep=off", "-seed", "1"])
                .args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
            line += " norandmaps random.trust_cpu=off";
        }
        line += " -- ";
        line += &self.arguments.join(" ");
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
        fs::write(&initrd, image(kernel, self.deterministic)?)
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
    let (path, program) = linux::program();
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
