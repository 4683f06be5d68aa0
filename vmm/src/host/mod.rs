//! What this host can do for guests, and what to do about what it can't.

mod probe;

use std::fs;
use std::io;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use crate::config::Backing;

/// Why stock guests can't run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostCannot {
    /// No /dev/kvm.
    #[error(
        "this host has no /dev/kvm: load kvm_intel or kvm_amd (modprobe), or switch on virtualization in the \
         firmware or in the hypervisor above; `make lab` runs guests without it"
    )]
    NoKvm,
    /// No permission.
    #[error(
        "/dev/kvm is not yours to open: join the group kvm (sudo usermod -aG kvm $USER) and log in anew; \
         `make lab` runs guests without it"
    )]
    NotPermitted,
    /// Something else is wrong with it.
    #[error("/dev/kvm can't be used: {0}; `make lab` runs guests without it")]
    Broken(String),
    /// Too old, or of another kind.
    #[error("this host's KVM lacks {0}: use a newer kernel; `make lab` runs guests without it")]
    Lacks(&'static str),
    /// It has no hardware behind it.
    #[error(
        "this host's KVM can't run stock kernels: it emulates the guest's ring 0 ({evidence}); use a host with \
         kvm_intel or kvm_amd, or run guests in the emulated host of `make lab`"
    )]
    EmulatesRing0 {
        /// What was seen.
        evidence: String,
    },
}

/// What every guest needs of KVM, by the names of linux/kvm.h.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
];

/// The stable API (Documentation/virt/kvm/api.rst).
const API_VERSION: i32 = 12;

/// Whose virtualization the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// VMX, module kvm_intel.
    Intel,
    /// SVM, module kvm_amd.
    Amd,
    /// Neither module is there: KVM works in some other way.
    Other,
}

/// Second-level address translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slat {
    /// EPT or NPT.
    On,
    /// The module was told not to use it, or the processor has none: shadow paging.
    Off,
    /// The module does not say.
    Unknown,
}

/// Whether stock kernels run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The processor runs guests, ring 0 included.
    RunsStockKernels,
    /// Ring 0 is emulated, and the emulator does not know all that stock kernels need.
    EmulatesRing0 {
        /// What was seen.
        evidence: String,
    },
    /// The probe itself failed.
    Unclear {
        /// Why.
        why: String,
    },
}

/// A KVM that can be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmFacts {
    /// Whose.
    pub vendor: Vendor,
    /// Modules of the kernel whose name starts with `kvm_`.
    pub modules: Vec<String>,
    /// Two-level paging.
    pub slat: Slat,
    /// The most vCPUs in one VM.
    pub most_vcpus: usize,
    /// Capabilities that are needed and missing, by their names in linux/kvm.h.
    pub missing: Vec<&'static str>,
    /// Whether stock kernels run.
    pub verdict: Verdict,
}

/// The host's huge pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// Reserved pages of 2 MiB.
    pub reserved: u64,
    /// Those that nobody uses or was promised.
    pub free: u64,
    /// Transparent huge pages: `always`, `madvise` or `never`; `None` where the kernel has none.
    pub transparent: Option<String>,
    /// The same for shared memory, which has some more modes.
    pub shared: Option<String>,
}

/// What this host can do for guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// KVM, or why it can't be opened.
    pub kvm: Result<KvmFacts, HostCannot>,
    /// Huge pages.
    pub huge_pages: HugePages,
}

impl Host {
    /// Looks at the host; takes a moment, as a tiny guest is run.
    pub fn look() -> Self {
        Self { kvm: open().map(|kvm| KvmFacts::of(&kvm)), huge_pages: HugePages::look() }
    }

    /// Whether `ballast run` would start here.
    ///
    /// # Errors
    /// [`HostCannot`] says what is missing and what to do.
    pub fn can_run(&self) -> Result<(), HostCannot> {
        let kvm = self.kvm.as_ref().map_err(Clone::clone)?;
        if let Some(name) = kvm.missing.first() {
            return Err(HostCannot::Lacks(name));
        }
        match &kvm.verdict {
            Verdict::EmulatesRing0 { evidence } => {
                Err(HostCannot::EmulatesRing0 { evidence: evidence.clone() })
            }
            Verdict::RunsStockKernels | Verdict::Unclear { .. } => Ok(()),
        }
    }
}

impl KvmFacts {
    fn of(kvm: &Kvm) -> Self {
        Self {
            vendor: vendor(),
            modules: modules(),
            slat: slat(),
            most_vcpus: kvm.get_max_vcpus(),
            missing: missing(kvm).collect(),
            verdict: probe::ring0(kvm),
        }
    }
}

impl HugePages {
    /// Pages of 2 MiB and transparent ones, as sysfs has them.
    pub fn look() -> Self {
        let read = |name| -> u64 {
            fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"))
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        Self {
            reserved: read("nr_hugepages"),
            // Reserved pages may be promised to mappings that have not touched them yet.
            free: read("free_hugepages").saturating_sub(read("resv_hugepages")),
            transparent: mode("enabled"),
            shared: mode("shmem_enabled"),
        }
    }

    /// Whether khugepaged may put huge pages together in memory of this kind, which is `advised` to
    /// lie in huge pages or isn't (Documentation/admin-guide/mm/transhuge.rst).
    pub fn collapse(&self, backing: Backing, advised: bool) -> bool {
        let mode = match backing {
            Backing::Anonymous => &self.transparent,
            Backing::Memfd => &self.shared,
            // As large as can be already.
            Backing::HugePages2M => return false,
        };
        match mode.as_deref() {
            None | Some("never" | "deny") => false,
            Some("madvise" | "advise") => advised,
            // `always`, `within_size`, `force`, and what later kernels think of.
            Some(_) => true,
        }
    }
}

/// How the kernel gives out transparent huge pages of 2 MiB: since Linux 6.8 each size has a mode of
/// its own, which may be to follow the common one.
fn mode(name: &str) -> Option<String> {
    const ALL: &str = "/sys/kernel/mm/transparent_hugepage";
    let read = |path: String| fs::read_to_string(path).ok().as_deref().and_then(chosen);
    let common = read(format!("{ALL}/{name}"))?;
    let own = read(format!("{ALL}/hugepages-2048kB/{name}"));
    Some(own.filter(|own| own != "inherit").unwrap_or(common))
}

/// The word in brackets: `always [madvise] never`.
fn chosen(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    Some(mode.to_owned())
}

fn vendor() -> Vendor {
    match (Path::new("/sys/module/kvm_intel").exists(), Path::new("/sys/module/kvm_amd").exists()) {
        (true, _) => Vendor::Intel,
        (_, true) => Vendor::Amd,
        _ => Vendor::Other,
    }
}

fn modules() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/module") else { return Vec::new() };
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    names.sort();
    names
}

fn slat() -> Slat {
    let read = |path| fs::read_to_string(path).ok();
    let parameter =
        read("/sys/module/kvm_intel/parameters/ept").or_else(|| read("/sys/module/kvm_amd/parameters/npt"));
    match parameter.as_deref().map(str::trim) {
        Some("Y" | "1") => Slat::On,
        Some("N" | "0") => Slat::Off,
        _ => Slat::Unknown,
    }
}

fn missing(kvm: &Kvm) -> impl Iterator<Item = &'static str> {
    let api = (kvm.get_api_version() != API_VERSION).then_some("the stable API (version 12)");
    api.into_iter()
        .chain(NEEDED.into_iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| name))
}

/// Opens /dev/kvm.
fn open() -> Result<Kvm, HostCannot> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => HostCannot::NoKvm,
        libc::EACCES | libc::EPERM => HostCannot::NotPermitted,
        other => HostCannot::Broken(io::Error::from_raw_os_error(other).to_string()),
    })
}

/// Opens /dev/kvm where stock guests run.
///
/// With kvm_intel or kvm_amd they do; only without them is it worth the time to try.
///
/// # Errors
/// [`HostCannot`] says what is missing and what to do.
pub fn open_for_guests() -> Result<Kvm, HostCannot> {
    let kvm = open()?;
    if let Some(name) = missing(&kvm).next() {
        return Err(HostCannot::Lacks(name));
    }
    if vendor() == Vendor::Other
        && let Verdict::EmulatesRing0 { evidence } = probe::ring0(&kvm)
    {
        return Err(HostCannot::EmulatesRing0 { evidence });
    }
    Ok(kvm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_mode_is_read() {
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("nonsense"), None);
    }

    #[test]
    fn khugepaged_comes_where_it_may() {
        let host = |transparent: &str, shared: &str| HugePages {
            transparent: Some(transparent.to_owned()),
            shared: Some(shared.to_owned()),
            ..HugePages::default()
        };
        let comes = |host: &HugePages, backing| [false, true].map(|advised| host.collapse(backing, advised));
        for (mode, shared, expected) in [
            ("always", "always", [true, true]),
            ("madvise", "advise", [false, true]),
            ("never", "never", [false, false]),
        ] {
            let host = host(mode, shared);
            assert_eq!(comes(&host, Backing::Anonymous), expected, "{mode}");
            assert_eq!(comes(&host, Backing::Memfd), expected, "{shared}");
            assert_eq!(comes(&host, Backing::HugePages2M), [false, false]);
        }
        assert_eq!(comes(&HugePages::default(), Backing::Anonymous), [false, false]);
    }

    #[test]
    fn looking_and_opening_agree() {
        let host = Host::look();
        let unclear = matches!(&host.kvm, Ok(KvmFacts { verdict: Verdict::Unclear { .. }, .. }));
        if !unclear {
            assert_eq!(host.can_run(), open_for_guests().map(|_| ()));
        }
    }
}
