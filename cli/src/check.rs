//! `ballast check`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use api::guest_memory;
use api::runtime;
use api::units::Bytes;
use balancer::host::HostMemory;
use balancer::host::zfs::{ARCSTATS, Arc};
use devices::virtio::block::ring::{self, NoRing};
use image::BootFile;
use image::disk::search::Plan;
use image::kernel::prepared::PreparedKernel;
use serde::Serialize;
use vmm::boot::files::search;
use vmm::config::{DiskOptions, MOST_CPUS};
use vmm::host::{Host, HugePages, KvmFacts, Slat, Vendor, Verdict};

use crate::cgroup;
use crate::failure::Failure;
use crate::growth::{self, Growth};
use crate::output;
use crate::unpacking::{KernelCache, finder, unpacking};
use crate::vm_file;

/// Say what this host can do for guests, and what to do about what it can't
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes: 0 this host runs guests, 3 it does not.

`good` needs nothing, `hint` could be better, `bad` keeps guests from running. A guest of a few
instructions is run to see whether the processor itself runs a guest's kernel.

Examples:
  ballast check
  ballast check /etc/ballast/vms/web.toml")]
pub struct Args {
    /// Say instead everything that is wrong with this VM's file, as `ballast run --config` takes it
    #[arg(value_name = "FILE", exclusive = true)]
    file: Option<PathBuf>,
    /// Say as well how this kernel would be booted
    #[arg(long, value_name = "FILE", group = "what_boots")]
    kernel: Option<PathBuf>,
    /// And how a guest with this initramfs would get memory beyond what it starts with
    #[arg(long, value_name = "FILE", requires = "what_boots")]
    initrd: Option<PathBuf>,
    /// Say as well what this disk would be booted by: PATH, then with commas as for `ballast run`
    #[arg(long, value_name = "SPEC", group = "what_boots")]
    disk: Option<DiskOptions>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    can_run: bool,
    findings: Vec<Finding>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Grade {
    Good,
    Hint,
    Bad,
}

/// One thing that was looked at.
#[derive(Serialize)]
struct Finding {
    about: &'static str,
    grade: Grade,
    found: String,
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn good(about: &'static str, found: impl Into<String>) -> Self {
        Self { about, grade: Grade::Good, found: found.into(), advice: None }
    }

    fn hint(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { about, grade: Grade::Hint, found: found.into(), advice: Some(advice.into()) }
    }

    fn bad(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { about, grade: Grade::Bad, found: found.into(), advice: Some(advice.into()) }
    }
}

pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(file) = &args.file {
        vm_file::check(file)?;
        return output::text(&format!("{} is in order\n", file.display()));
    }
    let host = Host::look();
    let mut findings = match &host.kvm {
        Ok(facts) => kvm(facts),
        // The sentence says what to do, too.
        Err(reason) => {
            vec![Finding { about: "kvm", grade: Grade::Bad, found: reason.to_string(), advice: None }]
        }
    };
    findings.extend(huge_pages(&host.huge_pages));
    findings.push(memory_limit(cgroup::limit()));
    findings.extend(Arc::read(Path::new(ARCSTATS)).map(zfs));
    let host_memory = HostMemory::read(Path::new("/proc/meminfo"));
    findings.extend(host_memory.ok().map(|host| largest_guest(host.total)));
    findings.push(sandbox());
    findings.push(disks(ring::look()));
    findings.push(directory());
    let mut files = args.kernel.as_ref().map(|kernel| (BootFile::at(kernel), None, None));
    if let Some(disk) = &args.disk {
        match search(disk, &finder()) {
            Ok(found) => {
                findings.push(boots(disk, &found.plan));
                let name = |path: &str| format!("{}:{path}", disk.path.display());
                let kernel = BootFile::taken(name(&found.plan.kernel), found.kernel);
                let initrd = name(&found.plan.initrd.join("+"));
                let memory_driver = found.plan.memory_driver.as_deref().map(|path| PathBuf::from(name(path)));
                files = Some((kernel, found.initrd.map(|file| BootFile::taken(initrd, file)), memory_driver));
            }
            // The sentence says what to do, too.
            Err(why) => findings.push(Finding {
                about: "disk",
                grade: Grade::Hint,
                found: why.to_string(),
                advice: None,
            }),
        }
    }
    if let Some((file, found, memory_driver)) = files {
        // What is kept says nothing of the process that unpacks.
        let unpacking = unpacking(Some(&KernelCache::Off));
        let initrd = args.initrd.as_ref().map(BootFile::at).or(found);
        let prepared = file.open().map_err(image::Error::Read).and_then(|file| unpacking.prepare(&file));
        let prepared = prepared.map(|(kernel, _)| kernel);
        findings.push(kernel(&file, &prepared));
        findings.push(grows(&file, initrd.as_ref(), memory_driver.as_deref(), &prepared));
    }
    let can_run = host.can_run();
    let report = Report { can_run: can_run.is_ok(), findings };
    if args.json {
        output::json(&report)?;
    } else {
        output::text(&render(&report.findings))?;
    }
    can_run.map_err(Failure::from)
}

fn kvm(facts: &KvmFacts) -> Vec<Finding> {
    let module = match facts.vendor {
        Vendor::Intel => "kvm_intel",
        _ => "kvm_amd",
    };
    vec![vendor(facts), ring0(facts), slat(facts, module), missing(facts), {
        Finding::good("vcpus", format!("up to {} in one VM", facts.most_vcpus.min(usize::from(MOST_CPUS))))
    }]
}

fn vendor(facts: &KvmFacts) -> Finding {
    match facts.vendor {
        Vendor::Intel => Finding::good("kvm", "/dev/kvm opens; Intel VMX, module kvm_intel"),
        Vendor::Amd => Finding::good("kvm", "/dev/kvm opens; AMD SVM, module kvm_amd"),
        Vendor::Other => Finding::hint(
            "kvm",
            format!(
                "/dev/kvm opens; neither VMX nor SVM is behind it (modules: {})",
                if facts.modules.is_empty() { "none".to_owned() } else { facts.modules.join(", ") }
            ),
            "use a host whose firmware and hypervisor allow virtualization, where guests are to be fast",
        ),
    }
}

fn ring0(facts: &KvmFacts) -> Finding {
    match &facts.verdict {
        Verdict::RunsStockKernels => Finding::good("ring 0", "the processor runs a guest's kernel itself"),
        Verdict::EmulatesRing0 { evidence } => Finding::bad(
            "ring 0",
            format!("a guest's kernel is emulated in software, and not all of it: {evidence}"),
            "use a host with kvm_intel or kvm_amd, or run guests in the emulated host of `make lab`",
        ),
        Verdict::Unclear { why } => Finding::hint(
            "ring 0",
            format!("a guest of a few instructions could not be run: {why}"),
            "try `ballast run`; if it fails, look into the host's kernel log (dmesg)",
        ),
    }
}

fn slat(facts: &KvmFacts, module: &str) -> Finding {
    let parameter = if facts.vendor == Vendor::Intel { "ept" } else { "npt" };
    match facts.slat {
        Slat::On => Finding::good("slat", format!("on: the processor translates twice ({parameter})")),
        Slat::Off => Finding::hint(
            "slat",
            "off: KVM shadows the guests' page tables, which costs an exit for many changes to them",
            format!("modprobe -r {module} && modprobe {module} {parameter}=1"),
        ),
        Slat::Unknown => Finding::hint(
            "slat",
            "no module says whether the processor translates twice (EPT, NPT)",
            "nothing, where guests are fast enough; else use a host with kvm_intel or kvm_amd",
        ),
    }
}

fn missing(facts: &KvmFacts) -> Finding {
    if facts.missing.is_empty() {
        Finding::good("interface", "KVM has all that ballast needs")
    } else {
        Finding::bad(
            "interface",
            format!("KVM lacks {}", facts.missing.join(", ")),
            "use a newer kernel on this host",
        )
    }
}

fn huge_pages(pages: &HugePages) -> [Finding; 2] {
    let reserved = if pages.reserved == 0 {
        Finding::hint(
            "huge pages",
            "none of 2 MiB are reserved, so that --hugepages can't be used",
            "sysctl vm.nr_hugepages=N, N being half of a guest's MiB; not needed without --hugepages",
        )
    } else {
        let found = format!("{} of 2 MiB are reserved, {} are free", pages.reserved, pages.free);
        Finding::good("huge pages", found)
    };
    let thp = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    let transparent = match pages.transparent.as_deref() {
        Some("always") => Finding::good(
            "thp",
            "transparent huge pages are given always; ballast keeps khugepaged from refilling what guests give up",
        ),
        Some("madvise") => Finding::good("thp", "transparent huge pages are given on request (--thp)"),
        Some(other) => {
            Finding::hint("thp", format!("transparent huge pages: {other}; --thp does nothing"), thp)
        }
        None => Finding::hint(
            "thp",
            "this kernel has no transparent huge pages; --thp can't be used",
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE, where guests are to be fast",
        ),
    };
    [reserved, transparent]
}

fn memory_limit(limit: Option<Bytes>) -> Finding {
    match limit {
        None => Finding::good("cgroup", "no control group limits the memory of VMs that are started here"),
        Some(limit) => Finding::hint(
            "cgroup",
            format!(
                "control groups leave {limit} to all VMs that are started here, and to what else is in them"
            ),
            "raise memory.max or memory.high (systemd: MemoryMax=, MemoryHigh=), or start VMs with less in a group \
             of their own (systemd-run --scope), where they are to have more",
        ),
    }
}

/// What a guest spends that may grow to all of this host.
fn largest_guest(total: Bytes) -> Finding {
    let cost = guest_memory::fixed_cost(total);
    Finding::good(
        "max",
        format!(
            "a guest with max={total}, all of this host, spends {cost} before it runs: start it with at least {}, \
             or let it plug (--grow plug)",
            guest_memory::least_start(total)
        ),
    )
}

fn zfs(arc: Arc) -> Finding {
    Finding::good(
        "zfs",
        format!(
            "the cache of ZFS holds {}; the balancer counts all above its least size of {} (zfs_arc_min) as available \
             to VMs: {}",
            arc.size,
            arc.least,
            arc.to_be_had()
        ),
    )
}

/// Who does the requests of disks.
fn disks(ring: Result<(), NoRing>) -> Finding {
    let Err(why) = ring else {
        let found =
            "io_uring: the host's kernel reads and writes raw disks by itself; threads of the VM do the rest";
        return Finding::good("disks", found);
    };
    let found = format!("threads of the VM do all that its disks are asked for: {why}");
    let advice = match why {
        NoRing::Disabled(_) => "sysctl kernel.io_uring_disabled=0, where disks are to be faster",
        NoRing::Missing | NoRing::Forbidden => {
            "use a kernel with CONFIG_IO_URING and, in a container, a profile that allows it, where disks are to be \
             faster"
        }
        NoRing::TooOld => "use a newer kernel on this host, where disks are to be faster",
        NoRing::Host(_) => "nothing, where disks are fast enough",
    };
    Finding::hint("disks", found, advice)
}

fn sandbox() -> Finding {
    match vmm::sandbox::check() {
        Ok(()) => Finding::good("sandbox", "Landlock keeps a VM's process from files"),
        Err(error) => Finding {
            about: "sandbox",
            grade: Grade::Hint,
            found: error.to_string(),
            // The sentence says what to do, too.
            advice: None,
        },
    }
}

fn directory() -> Finding {
    match runtime::directory() {
        Ok(path) => Finding::good("sockets", format!("VMs of this user are found in {}", path.display())),
        Err(error) => Finding {
            about: "sockets",
            grade: Grade::Hint,
            found: error.to_string(),
            advice: Some("`ballast run --no-api` works without it".to_owned()),
        },
    }
}

fn boots(disk: &DiskOptions, plan: &Plan) -> Finding {
    let Plan { place, by, kernel, initrd, cmdline, .. } = plan;
    let initrd = if initrd.is_empty() { "no initramfs".to_owned() } else { initrd.join(" and ") };
    Finding::good(
        "disk",
        format!(
            "{} boots {kernel} with {initrd} of {place}, found by {by}; its command line begins with `{cmdline}`",
            disk.path.display()
        ),
    )
}

fn kernel(file: &BootFile, prepared: &Result<PreparedKernel, image::Error>) -> Finding {
    let name = file.name().display();
    match prepared {
        Ok(kernel) => {
            let size = Bytes(kernel.shape().size);
            let moves = match kernel.relocations().len() {
                0 => "always at the same address, as it has no relocations".to_owned(),
                count => format!("at an address of chance, by {count} relocations"),
            };
            Finding::good("kernel", format!("{name} starts unpacked ({size} with its data), {moves}"))
        }
        Err(why) => Finding::hint(
            "kernel",
            format!("{name} is booted as it is: {why}"),
            "nothing, if it is a kernel: a bzImage unpacks itself in the guest, which takes longer",
        ),
    }
}

/// How a guest would grow.
fn grows(
    kernel: &BootFile,
    initrd: Option<&BootFile>,
    memory_driver: Option<&Path>,
    prepared: &Result<PreparedKernel, image::Error>,
) -> Finding {
    let growth = growth::of_guest(kernel, initrd, memory_driver, |_| match prepared {
        Ok(kernel) => Ok(Some(kernel)),
        Err(why) => Err(image::Error::Refused(why.to_string())),
    });
    match growth {
        Growth::Plug(_) | Growth::PlugLate(_) => Finding::good("growth", growth.to_string()),
        Growth::Balloon(_) => Finding::hint(
            "growth",
            growth.to_string(),
            "put virtio_mem into the initramfs (Linux 5.17 or later): a guest that plugs has no structures for memory \
             that it has not got",
        ),
    }
}

fn render(findings: &[Finding]) -> String {
    findings.iter().fold(String::new(), |mut text, finding| {
        let grade = match finding.grade {
            Grade::Good => "good",
            Grade::Hint => "hint",
            Grade::Bad => "bad",
        };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{grade:<4}  {:<10}  {}", finding.about, finding.found);
        if let Some(advice) = &finding.advice {
            let _ = writeln!(text, "{:18}do: {advice}", "");
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_zfs_would_give_is_said() {
        let finding = zfs(Arc { size: Bytes::gib(2), least: Bytes::mib(256) });
        assert!(finding.grade == Grade::Good);
        assert!(
            finding.found.contains("1.75 GiB") || finding.found.contains("1792 MiB"),
            "{}",
            finding.found
        );
    }
}
