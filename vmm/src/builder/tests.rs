//! Devices of a VM whose guest does not run, but for a processor that writes where it is told.

use api::limits::Limits;
use devices::sandbox::Call;
use devices::testing::note;
use devices::virtio::mmio;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::arch::x86_64::registers;
use crate::boot::kernel::Entry;
use crate::config::{Cpus, MemoryOptions};
use crate::kvm;

/// A VM without devices.
struct TestVm {
    kvm: Kvm,
    vm: Arc<VmFd>,
    ram: Ram,
}

impl TestVm {
    /// `None` where there is no KVM.
    fn new() -> Option<Self> {
        let kvm = kvm::for_tests()?;
        let ram = Ram::new(limits().max(), MemoryOptions::default()).expect("guest memory");
        let vm = kvm::create_vm(&kvm, ram.regions()).expect("a VM");
        Some(Self { kvm, vm, ram })
    }
}

fn limits() -> Limits {
    "64M,max=128M".parse().expect("limits")
}

/// The devices of a VM with `json` beside a balloon; `None` where there is no KVM.
fn devices(pci: Option<Range<u64>>, json: &str) -> Option<(Devices, Arc<VcpuSet>)> {
    let TestVm { vm, ram, .. } = TestVm::new()?;
    let vcpu_set = VcpuSet::new(1).expect("a signal");
    let control = Control::new("test".parse().expect("a name"), Cpus::ONE, limits());
    let mut builder = Builder::new(vm, pci, limits(), &ram, &control, &vcpu_set).expect("a bus");
    let list = format!("[{BALLOON}, {json}]");
    let list: Vec<DeviceConfig> = serde_json::from_str(&list).expect("a list of devices");
    for device in &list {
        builder.add(device).expect("a device");
    }
    let devices = builder.finish().expect("all of them");
    Some((devices, vcpu_set))
}

const BALLOON: &str = r#"{"id": "balloon", "type": "balloon"}"#;
const NOTE: &str = r#"{"id": "note0", "type": "note", "text": "hello", "file": "/etc/motd"}"#;
const RNG: &str = r#"{"id": "rng", "type": "rng"}"#;

/// A device of a kind that nobody knew before: what made it one is its file (`devices::testing::note`),
/// its variant of `Device`, and its line in `Builder::add`.
#[test]
fn a_new_kind_of_device_is_a_file_a_variant_and_a_line() {
    let Some((devices, _)) = devices(None, NOTE) else {
        return;
    };
    assert_eq!(devices.needs.read, ["/etc/motd"].map(std::path::PathBuf::from));
    assert!(devices.needs.calls.contains(&Call::any(libc::SYS_preadv)));
    let threads: Vec<_> = devices.threads.keys().map(ThreadName::as_str).collect();
    assert_eq!(threads, ["balloon", "note0"]);
    let [_, slot] = devices.platform.virtio[..] else { panic!("two devices") };
    let read = |offset: u64, data: &mut [u8]| devices.buses.read_memory(slot.window.0 + offset, data);
    let (mut id, mut text) = ([0; 4], [0; 5]);
    read(8, &mut id);
    read(0x100, &mut text);
    assert_eq!((u32::from_le_bytes(id), &text), (note::DEVICE_ID, b"hello"));
    assert_eq!(slot.size, mmio::WINDOW);
}

/// The same device on the bus, whose configuration it is found by.
#[test]
fn a_device_is_found_on_the_pci_bus_by_both_ways() {
    let window = 4 << 30..5 << 30;
    let found = devices(Some(window.clone()), NOTE);
    let Some((devices, _)) = found else { return };
    assert_eq!(devices.platform.virtio, []);
    let bridge = devices.platform.pci.clone().expect("a bridge");
    assert_eq!(bridge.window, window);
    let by_memory = |slot: u64, register: u64| {
        let mut dword = [0; 4];
        devices.buses.read_memory(bridge.ecam.0 + (slot << 15) + register, &mut dword);
        u32::from_le_bytes(dword)
    };
    let by_ports = |slot: u32, register: u32| {
        let mut dword = [0; 4];
        devices.buses.write_port(0xcf8, 4, &(1 << 31 | slot << 11 | register).to_le_bytes());
        devices.buses.read_port(0xcfc, 4, &mut dword);
        u32::from_le_bytes(dword)
    };
    // The bridge, the balloon and the note.
    assert_eq!(by_memory(0, 8) >> 16, 0x0600);
    let expected = (0x1040 + note::DEVICE_ID) << 16 | 0x1af4;
    assert_eq!((by_memory(2, 0), by_ports(2, 0), by_memory(3, 0)), (expected, expected, u32::MAX));
    // It decodes once it is told to, where its BAR says.
    let bar = u64::from(by_memory(2, 0x14)) << 32 | u64::from(by_memory(2, 0x10)) & !0xf;
    assert!(bridge.window.contains(&bar));
    let text = || {
        let mut text = [0; 5];
        devices.buses.read_memory(bar + 0x2000, &mut text);
        text
    };
    assert_eq!(text(), [0xff; 5]);
    devices.buses.write_memory(bridge.ecam.0 + (2 << 15) + 4, &[6, 0]);
    assert_eq!(&text(), b"hello");
}

#[test]
fn a_bus_full_of_devices_is_told() {
    let more = (0..40).map(|n| format!(r#"{{"id": "rng{n}", "type": "rng"}}"#));
    let list: Vec<DeviceConfig> = more.map(|json| serde_json::from_str(&json).expect("a device")).collect();
    let Some(TestVm { kvm, ram, .. }) = TestVm::new() else { return };
    let vcpu_set = VcpuSet::new(1).expect("a signal");
    let control = Control::new("test".parse().expect("a name"), Cpus::ONE, limits());
    for (pci, most, why) in [(Some(4 << 30..5 << 30), 31, "PCI bus is full"), (None, 7, "interrupt line")] {
        let vm = kvm::create_vm(&kvm, ram.regions()).expect("a VM");
        let mut builder = Builder::new(vm, pci, limits(), &ram, &control, &vcpu_set).expect("a bus");
        let refused = list.iter().position(|device| {
            builder
                .add(device)
                .inspect_err(|error| assert!(error.to_string().contains(why), "{error}"))
                .is_err()
        });
        assert_eq!(refused, Some(most));
    }
}

#[test]
fn each_way_out_ends_the_vm() {
    let pci = Some(4 << 30..5 << 30);
    for (pci, port, value, exit) in [
        (None, 0x505, 1, Exit::Panicked),
        (None, 0x600, 0x34, Exit::PoweredOff),
        (None, 0x602, 1, Exit::Reboot),
        (None, 0x64, 0xfe, Exit::Reboot),
        (pci, 0xcf9, 6, Exit::Reboot),
    ] {
        let found = devices(pci, RNG);
        let Some((devices, vcpu_set)) = found else { return };
        devices.buses.write_port(port, 1, &[0]);
        assert!(!vcpu_set.has_ended());
        devices.buses.write_port(port, 1, &[value]);
        assert_eq!(vcpu_set.wait_for_end(), exit);
    }
}

#[test]
fn devices_work_where_the_configuration_says() {
    let json = r#"{"id": "rng", "type": "rng", "thread": "slow"}, {"id": "agent", "type": "agent"}"#;
    let Some((devices, _)) = devices(None, json) else {
        return;
    };
    let threads: Vec<_> = devices.threads.iter().map(|(name, all)| (name.as_str(), all.len())).collect();
    assert_eq!(threads, [("balloon", 2), ("devices", 1), ("slow", 1)]);
}

/// A guest's processor that writes 32 bits to any address below 4 GiB.
struct Writer(VcpuFd);

impl Writer {
    const CODE: GuestAddress = GuestAddress(0x1_0000);

    fn new(kvm: &Kvm, vm: &VmFd, ram: &Ram) -> Self {
        // mov [rbx], eax; out 0x10, al
        ram.guest().write_slice(&[0x89, 0x03, 0xe6, 0x10], Self::CODE).expect("RAM");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("CPUID");
        let sregs = vcpu.get_sregs().expect("registers");
        vcpu.set_sregs(&registers::special(Entry::Linux64(Self::CODE), sregs, ram.guest()).expect("tables"))
            .expect("registers");
        Self(vcpu)
    }

    /// Writes, and returns whether that left the guest for this process.
    fn leaves(&mut self, address: u64) -> bool {
        let mut regs = registers::general(Entry::Linux64(Self::CODE));
        regs.rbx = address;
        self.0.set_regs(&regs).expect("registers");
        let mut leaves = false;
        loop {
            match self.0.run().expect("it runs") {
                VcpuExit::MmioWrite(at, _) => {
                    assert_eq!(at, address);
                    leaves = true;
                }
                VcpuExit::IoOut(0x10, _) => return leaves,
                other => panic!("{other:?}"),
            }
        }
    }
}

/// KVM takes notifications wherever the BAR is, but for the queue that the vCPU serves.
#[test]
fn notifications_end_in_kvm_and_follow_the_bar() {
    // Below 4 GiB, where the code above can write.
    let window = 0xd800_0000..0xda00_0000u64;
    let Some(TestVm { kvm, vm, ram, .. }) = TestVm::new() else { return };
    let vcpu_set = VcpuSet::new(1).expect("a signal");
    let control = Control::new("test".parse().expect("a name"), Cpus::ONE, limits());
    let mut builder =
        Builder::new(vm.clone(), Some(window.clone()), limits(), &ram, &control, &vcpu_set).expect("a bus");
    let balloon: DeviceConfig = serde_json::from_str(BALLOON).expect("a device");
    builder.add(&balloon).expect("a device");
    let devices = builder.finish().expect("all of them");
    let mut writer = Writer::new(&kvm, &vm, &ram);
    let function = devices.platform.pci.clone().expect("a bridge").ecam.0 + (1 << 15);
    let decode = |bits: u8| devices.buses.write_memory(function + 4, &[bits, 0]);
    // Four bytes a queue, from here in the BAR on: inflate, deflate.
    let (inflate, deflate) = (0x3000, 0x3004);
    for bar in [window.start, window.start + (1 << 20)] {
        devices.buses.write_memory(function + 0x10, &(bar as u32).to_le_bytes());
        assert!(writer.leaves(bar + inflate), "it decodes nothing yet");
        decode(2);
        assert!(!writer.leaves(bar + inflate));
        assert!(writer.leaves(bar + deflate));
        decode(0);
        assert!(writer.leaves(bar + inflate));
    }
}
