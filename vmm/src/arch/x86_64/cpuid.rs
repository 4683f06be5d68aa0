//! What the guest's processor claims to be: the host's, as far as KVM can give it, less
//! what a guest here should not use.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::Cpus;

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// One change to what KVM supports.
struct Rule {
    leaf: u32,
    register: Register,
    /// Bits that the guest does not see.
    clear: u32,
    /// Bits that it always sees.
    set: u32,
    /// Why; for readers of this table.
    #[allow(dead_code)]
    reason: &'static str,
}

const ALL: u32 = u32::MAX;
/// KVM's paravirtual features (kernel: Documentation/virt/kvm/x86/cpuid.rst).
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
/// A guest may end an interrupt by a store to its own memory.
const KVM_FEATURE_PV_EOI: u32 = 6;

/// Every bit in which a guest's CPUID differs from KVM's offer, beside topology.
const RULES: &[Rule] = &[
    Rule {
        leaf: 0x1,
        register: Ecx,
        clear: 1 << 3,
        set: 0,
        reason: "MONITOR/MWAIT would exit on every idle",
    },
    Rule { leaf: 0x1, register: Ecx, clear: 1 << 5, set: 0, reason: "VMX: nested guests are not supported" },
    Rule { leaf: 0x1, register: Ecx, clear: 1 << 15, set: 0, reason: "PDCM: there is no PMU to ask about" },
    Rule {
        leaf: 0x1,
        register: Ecx,
        clear: 0,
        set: 1 << 24,
        reason: "TSC deadline: the in-kernel APIC has it, and there is no PIT",
    },
    Rule { leaf: 0x1, register: Ecx, clear: 0, set: 1 << 31, reason: "a hypervisor is present" },
    Rule {
        leaf: 0x6,
        register: Eax,
        clear: ALL,
        set: 1 << 2,
        reason: "no thermal sensors; the APIC timer always runs",
    },
    Rule { leaf: 0x6, register: Ebx, clear: ALL, set: 0, reason: "no thermal sensors" },
    Rule { leaf: 0x6, register: Ecx, clear: ALL, set: 0, reason: "no APERF/MPERF: their MSRs would exit" },
    Rule {
        leaf: 0xa,
        register: Eax,
        clear: ALL,
        set: 0,
        reason: "no PMU: its counters would show the host's work",
    },
    Rule { leaf: 0xa, register: Ebx, clear: ALL, set: 0, reason: "no PMU" },
    Rule { leaf: 0xa, register: Ecx, clear: ALL, set: 0, reason: "no PMU" },
    Rule { leaf: 0xa, register: Edx, clear: ALL, set: 0, reason: "no PMU" },
    Rule { leaf: 0x7, register: Ebx, clear: 1 << 2, set: 0, reason: "SGX needs memory of its own" },
    Rule { leaf: 0x7, register: Ecx, clear: 1 << 30, set: 0, reason: "SGX launch control" },
    Rule { leaf: 0x12, register: Eax, clear: ALL, set: 0, reason: "SGX" },
    Rule { leaf: 0x12, register: Ebx, clear: ALL, set: 0, reason: "SGX" },
    Rule {
        leaf: 0x8000_0001,
        register: Ecx,
        clear: 1 << 2,
        set: 0,
        reason: "SVM: nested guests are not supported",
    },
    Rule {
        leaf: 0x8000_0001,
        register: Ecx,
        clear: 1 << 23 | 1 << 24 | 1 << 28,
        set: 0,
        reason: "no PMU (AMD's extended counters)",
    },
    Rule { leaf: 0x8000_000a, register: Eax, clear: ALL, set: 0, reason: "SVM" },
    Rule { leaf: 0x8000_000a, register: Ebx, clear: ALL, set: 0, reason: "SVM" },
    Rule { leaf: 0x8000_000a, register: Edx, clear: ALL, set: 0, reason: "SVM" },
    Rule {
        leaf: 0x8000_001f,
        register: Eax,
        clear: ALL,
        set: 0,
        reason: "SEV: guest memory here is not encrypted",
    },
    Rule { leaf: 0x8000_0022, register: Eax, clear: ALL, set: 0, reason: "no PMU (AMD version 2)" },
];

/// Bits in a guest physical address, as far as the processor and the tables that translate it go.
pub fn address_bits(supported: &CpuId) -> u32 {
    // The architecture's least where nobody says (SDM volume 2, CPUID, leaf 80000008H).
    const LEAST: u32 = 36;
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(LEAST, |leaf| {
        let (physical, guest) = (leaf.eax & 0xff, leaf.eax >> 16 & 0xff);
        // KVM tells the second where its tables have fewer levels than the processor's addresses ask for.
        if guest == 0 { physical } else { physical.min(guest) }
    })
}

/// Whether this host is a machine that QEMU emulates in software.
pub fn host_is_emulated() -> bool {
    let hypervisor = __cpuid(0x1).ecx >> 31 == 1;
    let name = __cpuid(0x4000_0000);
    hypervisor && name.ebx.to_le_bytes() == *b"TCGT"
}

/// The CPUID of vCPU `index` among `cpus`, made from what KVM supports.
///
/// On an `emulated` host the end of an interrupt leaves the guest, where it would be a store to its own memory.
/// QEMU 7.2 does not forget the interrupt that KVM gave a guest along with VMRUN before that guest leaves for
/// whatever reason (target/i386/tcg/sysemu/svm_helper.c: `exception_index` stays set). When the emulator stops in
/// between to look at its clock it delivers the interrupt again, though the guest holds interrupts back: a kernel
/// that took a lock of its timers meanwhile waits for itself for ever. The end of the interrupt comes before that.
pub fn of_vcpu(supported: &CpuId, index: u8, cpus: Cpus, emulated: bool) -> CpuId {
    let mut cpuid = supported.clone();
    if emulated {
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == KVM_CPUID_FEATURES) {
            entry.eax &= !(1 << KVM_FEATURE_PV_EOI);
        }
    }
    // Extended topology is written anew below: KVM offers it with a host's numbers, or not at all.
    cpuid.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    for entry in cpuid.as_mut_slice() {
        apply_rules(entry);
        apply_topology(entry, index, cpus);
    }
    let highest = cpuid.as_slice().iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if highest >= 0xb {
        for entry in extended_topology(index, cpus) {
            // A list that is full already (256 entries) has no need of it: leaf 1 says the same.
            let _ = cpuid.push(entry);
        }
    }
    cpuid
}

fn apply_rules(entry: &mut kvm_cpuid_entry2) {
    // Sub-leaves of 7 above the first have other meanings.
    if entry.index != 0 {
        return;
    }
    for rule in RULES.iter().filter(|rule| rule.leaf == entry.function) {
        let register = match rule.register {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        };
        *register = *register & !rule.clear | rule.set;
    }
}

/// Bits that an APIC identifier of `cpus` vCPUs takes.
const fn identifier_bits(cpus: Cpus) -> u32 {
    (cpus.get() as u32).next_power_of_two().trailing_zeros()
}

/// One socket, one thread a core (SDM volume 2, CPUID; APM volume 3, appendix E).
fn apply_topology(entry: &mut kvm_cpuid_entry2, index: u8, cpus: Cpus) {
    let (id, count) = (u32::from(index), u32::from(cpus.get()));
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
            // HTT: the count in EBX is valid.
            let several = u32::from(count > 1) << 28;
            entry.edx = entry.edx & !(1 << 28) | several;
        }
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1).min(0x3f) << 26;
        }
        0x8000_0001 => {
            // CmpLegacy: several cores, no threads.
            let several = u32::from(count > 1) << 1;
            entry.ecx = entry.ecx & !(1 << 1) | several;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (count - 1) | identifier_bits(cpus) << 12,
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Leaf 0xb: threads in a core, cores in the package (SDM volume 2, CPUID, leaf 0BH).
fn extended_topology(index: u8, cpus: Cpus) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let level = |sub: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: sub,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: sub | kind,
        edx: index.into(),
        ..Default::default()
    };
    [level(0, 0, 1, THREADS), level(1, identifier_bits(cpus), cpus.get().into(), CORES), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MOST_CPUS;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL, ..Default::default() }
    }

    #[test]
    fn each_vcpu_has_an_identifier_of_its_own() {
        let offered =
            CpuId::from_entries(&[entry(0), entry(1), entry(0xb), entry(0x8000_001e)]).expect("fits");
        let cpus: Cpus = "4".parse().expect("vCPUs");
        for index in 0..4 {
            let cpuid = of_vcpu(&offered, index, cpus, false);
            let find = |function: u32, sub: u32| {
                *cpuid.as_slice().iter().find(|e| e.function == function && e.index == sub).expect("leaf")
            };
            assert_eq!(find(1, 0).ebx >> 24, u32::from(index));
            assert_eq!(find(0xb, 0).edx, u32::from(index));
            assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx), (2, 4));
            assert_eq!(find(0x8000_001e, 0).eax, u32::from(index));
        }
    }

    /// Reads identifiers as a kernel does (Linux: arch/x86/kernel/cpu/topology.c, intel.c, amd.c and cacheinfo.c; SDM
    /// volume 3, 9.9; APM volume 3, appendix E), from the leaves of both vendors, for each number of vCPUs.
    #[test]
    fn any_number_of_vcpus_is_one_socket_of_as_many_cores() {
        let leaf = |function, index, eax| kvm_cpuid_entry2 { index, eax, ..entry(function) };
        // Caches: data, instructions, level 2, level 3, and the end of the list.
        let caches = [0x21, 0x22, 0x43, 0x63, 0].into_iter().zip(0..);
        let caches =
            caches.flat_map(|(kind, sub)| [4, 0x8000_001d].map(|function| leaf(function, sub, kind)));
        let plain = [0, 1, 0xb, 0x8000_0001, 0x8000_0008, 0x8000_001e].map(entry);
        let offered: Vec<_> = plain.into_iter().chain(caches).collect();
        let offered = CpuId::from_entries(&offered).expect("fits");
        for count in 1..=MOST_CPUS {
            let cpus = Cpus::try_from(count).expect("a number of vCPUs");
            let mut seen = Vec::new();
            for index in 0..count {
                let cpuid = of_vcpu(&offered, index, cpus, false);
                let find = |function: u32, sub: u32| {
                    let found = cpuid.as_slice().iter().find(|e| e.function == function && e.index == sub);
                    *found.expect("the leaf is there")
                };
                let (one, id) = (find(1, 0), find(0xb, 0).edx);
                let count = u32::from(count);
                seen.push(id);
                assert!(id < 255, "255 is everybody");
                assert_eq!([one.ebx >> 24, find(0xb, 1).edx, find(0x8000_001e, 0).eax], [id; 3]);
                // Leaf 1: how many, where several are there.
                assert_eq!((one.ebx >> 16 & 0xff, one.edx >> 28 & 1 == 1), (count, count > 1));

                // Leaf 0BH: one thread a core; above the bits of the cores the socket's, which are 0.
                let (threads, cores, end) = (find(0xb, 0), find(0xb, 1), find(0xb, 2));
                assert_eq!((threads.eax & 0x1f, threads.ebx, threads.ecx >> 8 & 0xff), (0, 1, 1));
                assert_eq!((cores.ebx, cores.ecx >> 8 & 0xff), (count, 2));
                let bits = cores.eax & 0x1f;
                assert_eq!((id >> bits, 1 << bits >= count, 1 << bits < 2 * count), (0, true, true));
                assert_eq!((end.ebx, end.ecx >> 8 & 0xff), (0, 0), "the list's end");

                // Leaf 4: room for all cores, as far as its 6 bits go; own caches of levels 1 and 2, one of level 3.
                let room = |field: u32| (field + 1).next_power_of_two();
                for sub in 0..4 {
                    for (function, mask) in [(4, 0xfff), (0x8000_001d, 0xfff)] {
                        let cache = find(function, sub);
                        let sharing = room(cache.eax >> 14 & mask).trailing_zeros();
                        let shared = if sub == 3 { 0 } else { id };
                        assert_eq!(id >> sharing, shared, "leaf {function:#x}, {sub}, of {count}");
                    }
                    assert_eq!(room(find(4, sub).eax >> 26), count.next_power_of_two().min(64));
                }
                assert_eq!(find(4, 4).eax, 0, "the list's end");

                // AMD: cores and the bits of their identifiers; a core for each, on one node.
                let (size, core) = (find(0x8000_0008, 0).ecx, find(0x8000_001e, 0));
                assert_eq!((size & 0xff) + 1, count);
                assert!(1 << (size >> 12 & 0xf) >= count);
                assert_eq!((core.ebx & 0xff, core.ebx >> 8 & 0xff, core.ecx), (id, 0, 0));
                assert_eq!(find(0x8000_0001, 0).ecx >> 1 & 1 == 1, count > 1);
            }
            assert_eq!(seen, (0..u32::from(count)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn addresses_end_where_the_tables_do() {
        let bits = |eax| {
            let leaf = kvm_cpuid_entry2 { eax, ..entry(0x8000_0008) };
            address_bits(&CpuId::from_entries(&[leaf]).expect("fits"))
        };
        assert_eq!([0x3028, 0x30_3034, 0x34_3030].map(bits), [40, 48, 48]);
        assert_eq!(address_bits(&CpuId::from_entries(&[]).expect("fits")), 36);
    }

    #[test]
    fn on_an_emulated_host_an_interrupts_end_leaves_the_guest() {
        let offered = CpuId::from_entries(&[entry(KVM_CPUID_FEATURES)]).expect("fits");
        let features = |emulated| of_vcpu(&offered, 0, Cpus::ONE, emulated).as_slice()[0].eax;
        assert_eq!(features(false), ALL);
        assert_eq!(features(true), ALL & !(1 << 6));
    }

    #[test]
    fn the_rules_win_over_the_offer() {
        let offered = CpuId::from_entries(&[entry(1), entry(0xa), entry(0x8000_0001)]).expect("fits");
        let cpuid = of_vcpu(&offered, 0, Cpus::ONE, false);
        let [one, pmu, extended] = cpuid.as_slice() else { panic!("three leaves") };
        assert_eq!(one.ecx & (1 << 3 | 1 << 5), 0);
        assert_eq!(one.ecx >> 31, 1);
        assert_eq!(pmu.eax, 0);
        assert_eq!(extended.ecx & 1 << 2, 0);
    }
}
