//! What a host says of itself: files, CPUID, and the fingerprint of a report.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeMap;
use std::fs;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

/// What a report needs to be compared with another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The processor's name.
    pub processor: String,
    /// Kernel release.
    pub kernel: String,
    /// The hypervisor that this host itself runs under, by CPUID leaf 0x40000000.
    pub hypervisor: Option<String>,
    /// CPUs this process may use.
    pub cpus: usize,
    /// Memory.
    pub memory: Bytes,
    /// Transparent huge pages: the mode set.
    pub transparent_huge_pages: Option<String>,
    /// Parameters of the KVM modules.
    pub modules: BTreeMap<String, String>,
    /// Version of ballast.
    pub ballast: String,
}

/// The first line of a file, without the space around it.
pub fn line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

/// A field of /proc/cpuinfo, of the first processor.
pub fn cpuinfo(field: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == field).then(|| value.trim().to_owned())
    })
}

fn leaf(number: u32) -> Option<std::arch::x86_64::CpuidResult> {
    let range = __cpuid(number & 0xf000_0000);
    (number <= range.eax).then(|| __cpuid_count(number, 0))
}

/// The signature of the hypervisor below this host; `None` on bare metal.
pub fn hypervisor() -> Option<String> {
    if __cpuid(1).ecx >> 31 == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    let text: String =
        bytes.iter().map(|b| char::from(*b)).filter(|c| c.is_ascii_graphic() || *c == ' ').collect();
    Some(if text.is_empty() { "unnamed".into() } else { text })
}

/// Whether this host's own instructions are emulated one by one by software. Not each emulator says so itself: the
/// lab does where it is its own.
pub fn is_emulated() -> bool {
    lab::time_is_emulated() || hypervisor().is_some_and(|name| name.starts_with("TCGTCG"))
}

/// One thing learned about the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// What it is about.
    pub name: String,
    /// What was found.
    pub value: String,
    /// Where.
    pub source: String,
}

fn fact(name: &str, value: impl Into<String>, source: &str) -> Fact {
    Fact { name: name.into(), value: value.into(), source: source.into() }
}

fn yes(bit: bool) -> String {
    String::from(if bit { "yes" } else { "no" })
}

/// The module behind /dev/kvm, as far as /sys/module tells.
pub fn kvm_module() -> Option<String> {
    let names = ["kvm_intel", "kvm_amd", "kvm_pvm"];
    names.into_iter().find(|name| fs::exists(format!("/sys/module/{name}")).unwrap_or(false)).map(Into::into)
}

/// Parameters of the KVM modules that matter here, as `module.parameter`.
pub fn module_parameters() -> BTreeMap<String, String> {
    let known = [
        ("kvm", &["tdp_mmu", "nx_huge_pages"][..]),
        ("kvm_intel", &["ept", "eptad", "vpid", "unrestricted_guest", "nested", "pml", "enable_shadow_vmcs"]),
        ("kvm_amd", &["npt", "nested", "avic", "vgif", "vls"]),
        ("kvm_pvm", &["pvm_native", "pvm_emul_batch"]),
    ];
    known
        .iter()
        .flat_map(|(module, names)| names.iter().map(move |name| (module, name)))
        .filter_map(|(module, name)| {
            let value = line(&format!("/sys/module/{module}/parameters/{name}"))?;
            Some((format!("{module}.{name}"), value))
        })
        .collect()
}

/// Whether the loaded module says that SLAT is on; `None` where it has no such parameter.
///
/// Never `kvm.tdp_mmu`: that reads Y with `npt=0` too.
pub fn slat_by_module(parameters: &BTreeMap<String, String>) -> Option<bool> {
    let value = parameters.get("kvm_intel.ept").or_else(|| parameters.get("kvm_amd.npt"))?;
    Some(matches!(value.as_str(), "Y" | "1"))
}

/// What CPUID says, and /proc/cpuinfo, which also knows Intel's VMX capabilities
/// (they are in model-specific registers, which take root to read).
pub fn facts() -> Vec<Fact> {
    let mut facts = Vec::new();
    if let Some(name) = hypervisor() {
        facts.push(fact("this host runs under", name, "CPUID 40000000"));
    }
    let extended = leaf(0x8000_0001);
    let (svm, gigabyte) = extended.map_or((false, false), |l| (l.ecx >> 2 & 1 == 1, l.edx >> 26 & 1 == 1));
    let vmx = __cpuid(1).ecx >> 5 & 1 == 1;
    facts.push(fact("VMX", yes(vmx), "CPUID 1"));
    facts.push(fact("SVM", yes(svm), "CPUID 80000001"));
    if let (true, Some(l)) = (svm, leaf(0x8000_000a)) {
        facts.push(fact("NPT", yes(l.edx & 1 == 1), "CPUID 8000000A"));
        facts.push(fact("ASIDs", l.ebx.to_string(), "CPUID 8000000A"));
        facts.push(fact("next RIP saved", yes(l.edx >> 3 & 1 == 1), "CPUID 8000000A"));
        facts.push(fact("flush by ASID", yes(l.edx >> 6 & 1 == 1), "CPUID 8000000A"));
    }
    facts.push(fact("1 GiB pages", yes(gigabyte), "CPUID 80000001"));
    let la57 = leaf(7).is_some_and(|l| l.ecx >> 16 & 1 == 1);
    facts.push(fact("5-level tables", yes(la57), "CPUID 7"));
    if let Some(l) = leaf(0x8000_0008) {
        let bits = format!("{} physical, {} virtual", l.eax & 0xff, l.eax >> 8 & 0xff);
        facts.push(fact("address bits", bits, "CPUID 80000008"));
    }
    let flags = [cpuinfo("flags"), cpuinfo("vmx flags")].map(Option::unwrap_or_default).join(" ");
    for (flag, name) in [
        ("ept", "EPT"),
        ("ept_ad", "EPT A/D bits"),
        ("ept_5level", "EPT with 5 levels"),
        ("ept_1gb", "EPT 1 GiB pages"),
        ("vpid", "VPID"),
        ("npt", "NPT"),
        ("pcid", "PCID"),
    ] {
        if flags.split_whitespace().any(|f| f == flag) {
            facts.push(fact(name, "yes", "/proc/cpuinfo"));
        }
    }
    facts
}

/// The fingerprint of this host.
pub fn fingerprint() -> Fingerprint {
    Fingerprint {
        processor: cpuinfo("model name").unwrap_or_else(|| "unknown".into()),
        kernel: line("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
        hypervisor: hypervisor(),
        cpus: std::thread::available_parallelism().map_or(1, Into::into),
        memory: KernelMemory::total().unwrap_or_default(),
        transparent_huge_pages: line("/sys/kernel/mm/transparent_hugepage/enabled")
            .and_then(|l| Some(l.split_once('[')?.1.split_once(']')?.0.to_owned())),
        modules: module_parameters(),
        ballast: env!("CARGO_PKG_VERSION").into(),
    }
}

/// Memory of the host's kernel that virtual machines make grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelMemory {
    /// Second-level and shadow tables (`SecPageTables`, Linux 6.1 and later).
    pub tables: Option<Bytes>,
    /// Reverse maps and tracking, among all else in vmalloc (`VmallocUsed`).
    pub vmalloc: Option<Bytes>,
    /// All kernel memory of this process's control group (cgroup 2, `kernel` in `memory.stat`); `None`
    /// without one, or in the root, which counts none.
    #[serde(default)]
    pub cgroup: Option<Bytes>,
}

impl KernelMemory {
    /// As it is now, of the whole host.
    pub fn now() -> Self {
        let whole = Self::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        Self { cgroup: of_cgroup(), ..whole }
    }

    fn total() -> Option<Bytes> {
        Self::field(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")
    }

    fn field(text: &str, name: &str) -> Option<Bytes> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        kib.checked_mul(1024).map(Bytes)
    }

    fn parse(text: &str) -> Self {
        Self {
            tables: Self::field(text, "SecPageTables"),
            vmalloc: Self::field(text, "VmallocUsed"),
            cgroup: None,
        }
    }

    /// What was added since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        let grown = |now: Option<Bytes>, then: Option<Bytes>| Some(now?.saturating_sub(then?));
        Self {
            tables: grown(self.tables, earlier.tables),
            vmalloc: grown(self.vmalloc, earlier.vmalloc),
            cgroup: grown(self.cgroup, earlier.cgroup),
        }
    }
}

/// Host memory that could still be given out (`MemAvailable`).
pub fn available_memory() -> Option<Bytes> {
    KernelMemory::field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// `kernel` of this process's control group, where it is not the root (Documentation/admin-guide/cgroup-v2.rst).
fn of_cgroup() -> Option<Bytes> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let stat = fs::read_to_string(format!("/sys/fs/cgroup/{path}/memory.stat")).ok()?;
    stat.lines().find_map(|line| line.strip_prefix("kernel ")?.trim().parse().ok()).map(Bytes)
}

/// KVM for a test; `None`, with a word, on a machine that has none.
///
/// # Panics
/// In a host of the lab, which has it: a test that finds none there has found a fault.
#[cfg(test)]
pub(crate) fn kvm_for_tests() -> Option<kvm_ioctls::Kvm> {
    let kvm = kvm_ioctls::Kvm::new();
    assert!(kvm.is_ok() || !lab::inside(), "a host of the lab has KVM: {kvm:?}");
    kvm.inspect_err(|error| eprintln!("not run: no usable /dev/kvm ({error})")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo_and_survives_nonsense() {
        let memory = KernelMemory::parse("MemTotal: 5 kB\nSecPageTables:     12 kB\nVmallocUsed: 3 kB\n");
        assert_eq!(memory.tables, Some(Bytes::kib(12)));
        assert_eq!(memory.vmalloc, Some(Bytes::kib(3)));
        assert_eq!(KernelMemory::parse("SecPageTables"), KernelMemory::default());
        assert_eq!(KernelMemory::parse("SecPageTables: 99999999999999999999 kB").tables, None);
        let grown = memory.since(KernelMemory { tables: Some(Bytes::kib(2)), ..KernelMemory::default() });
        assert_eq!((grown.tables, grown.vmalloc), (Some(Bytes::kib(10)), None));
    }

    #[test]
    fn the_module_says_slat_and_tdp_mmu_never_does() {
        let with = |name: &str, value: &str| slat_by_module(&[(name.into(), value.into())].into());
        assert_eq!(with("kvm_intel.ept", "Y"), Some(true));
        assert_eq!(with("kvm_amd.npt", "0"), Some(false));
        assert_eq!(with("kvm_amd.npt", "N"), Some(false));
        assert_eq!(with("kvm.tdp_mmu", "Y"), None);
    }

    #[test]
    fn this_host_has_a_fingerprint() {
        let print = fingerprint();
        assert!(print.memory > Bytes::mib(16) && print.cpus > 0, "{print:?}");
        assert!(facts().iter().any(|f| f.name == "SVM"));
    }
}
