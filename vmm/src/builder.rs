//! Makes the devices that a configuration lists, each by one line for its kind, and gathers what they need:
//! threads to work on, and leave from the sandbox.

mod memory;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use api::limits::Limits;
use balloon::device::Handle;
use balloon::mechanism::steering::Steering;
use balloon::plug;
use devices::platform::OnEnd;
use devices::sandbox::SandboxNeeds;
#[cfg(test)]
use devices::testing::note::Note;
use devices::virtio::device::VirtioDevice;
use devices::virtio::rng::Rng;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi::Platform;
use crate::bus::Buses;
use crate::config::{BalloonOptions, ConfigError, Device, DeviceConfig, SerialOptions, ThreadName};
use crate::console::{self, Console, ConsoleError};
use crate::control::Control;
use crate::events::Subscriber;
use crate::exit::Exit;
use crate::memory::Ram;
use crate::steering::Steered;
use crate::vcpu_set::VcpuSet;
use crate::wiring::{Virtio, Wiring, WiringError};

/// Why a VM's devices could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// They don't go together.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// One could not be connected.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The host gave no descriptors for one, or something else that it needs.
    #[error("the host refused {what}: {source}")]
    Host {
        /// What was asked of it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// `map_err` with what was asked of the host.
fn refused(what: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

/// The threads on which devices work, with those that work there.
pub type Threads = BTreeMap<ThreadName, Vec<Subscriber>>;

/// A VM's devices.
pub struct Devices {
    /// Where vCPUs reach them.
    pub buses: Buses,
    /// What the guest must be told of them.
    pub platform: Platform,
    /// Where they work.
    pub threads: Threads,
    /// Those that have queues: they are held while the VM is paused.
    pub virtio: Vec<Virtio>,
    /// What they need of the sandbox.
    pub needs: SandboxNeeds,
    /// What moves the guest's memory.
    pub steering: Steering,
    /// The line of the power button.
    pub power: EventFd,
    /// Held until the end: the terminal and the socket are given back when it goes.
    pub console: Option<Console>,
}

/// Makes devices, one after the other.
pub struct Builder<'a> {
    limits: Limits,
    ram: &'a Ram,
    control: &'a Control,
    vcpu_set: &'a Arc<VcpuSet>,
    wiring: Wiring,
    power: EventFd,
    threads: Threads,
    virtio: Vec<Virtio>,
    needs: SandboxNeeds,
    balloon: Option<Handle>,
    plug: Option<plug::Handle>,
    console: Option<Console>,
}

impl<'a> Builder<'a> {
    /// A VM with no devices but those that each has. Its virtio devices go on a PCI bus whose BARs lie in
    /// `pci`, and without it behind memory-mapped registers.
    ///
    /// # Errors
    /// [`BuildError`] says what could not be had.
    pub fn new(
        vm: Arc<VmFd>,
        pci: Option<Range<u64>>,
        limits: Limits,
        ram: &'a Ram,
        control: &'a Control,
        vcpu_set: &'a Arc<VcpuSet>,
    ) -> Result<Self, BuildError> {
        let ended = Arc::clone(vcpu_set);
        let on_end: OnEnd = Arc::new(move |end| ended.end(Exit::from(end)));
        let (wiring, power) = Wiring::new(vm, Arc::clone(ram.guest()), &on_end, pci)?;
        Ok(Self {
            limits,
            ram,
            control,
            vcpu_set,
            wiring,
            power,
            threads: Threads::new(),
            virtio: Vec::new(),
            needs: SandboxNeeds::default(),
            balloon: None,
            plug: None,
            console: None,
        })
    }

    /// The bus so far, for what is no device of the configuration.
    pub fn buses(&mut self) -> &mut Buses {
        self.wiring.buses()
    }

    /// Makes a device and connects it.
    ///
    /// # Errors
    /// [`BuildError`] says what could not be had.
    pub fn add(&mut self, config: &DeviceConfig) -> Result<(), BuildError> {
        let (shared, memory) = (ThreadName::shared(), ThreadName::memory());
        match &config.device {
            Device::Serial(options) => self.serial(config, options),
            Device::Balloon(options) => {
                let balloon = self.balloon(*options)?;
                self.virtio(config, memory, balloon)
            }
            Device::Memory => match self.plug()? {
                Some(plug) => self.virtio(config, memory, plug),
                // It starts with all that it may have.
                None => Ok(()),
            },
            Device::Rng => self.virtio(config, shared, Rng::new()),
            Device::Agent => self.virtio(config, shared, self.control.agent().port()),
            #[cfg(test)]
            Device::Note(options) => {
                self.virtio(config, ThreadName::own(&config.id), Note::new(options.clone()))
            }
        }
    }

    /// Connects a virtio device, and has it work on `usual` where the configuration names no other thread.
    fn virtio(
        &mut self,
        config: &DeviceConfig,
        usual: ThreadName,
        device: impl VirtioDevice + 'static,
    ) -> Result<(), BuildError> {
        self.needs.add(device.sandbox_needs());
        let device = self.wiring.virtio(Box::new(device))?;
        self.virtio.push(Arc::clone(&device));
        self.serve(config.thread.clone().unwrap_or(usual), device);
        Ok(())
    }

    fn serve(&mut self, thread: ThreadName, subscriber: Subscriber) {
        self.threads.entry(thread).or_default().push(subscriber);
    }

    fn serial(&mut self, config: &DeviceConfig, options: &SerialOptions) -> Result<(), BuildError> {
        let interrupt = self.wiring.serial_interrupt()?;
        let console = Console::open(&options.console, interrupt, self.vcpu_set)?;
        self.wiring.serial(Arc::clone(&console.port))?;
        self.needs.add(console::sandbox_needs(&options.console));
        self.serve(config.thread.clone().unwrap_or_else(ThreadName::shared), console.input.clone());
        self.console = Some(console);
        Ok(())
    }

    fn balloon(&mut self, options: BalloonOptions) -> Result<balloon::device::Balloon, BuildError> {
        let (balloon, handle) =
            memory::balloon(options, self.limits, self.ram).map_err(refused("a balloon"))?;
        let (reports, agent) = (Arc::clone(self.control.events()), self.control.agent().clone());
        handle.when_reported(move || reports.report_came());
        handle.when_stalled(move || agent.stalls(Instant::now()));
        self.balloon = Some(handle);
        Ok(balloon)
    }

    fn plug(&mut self) -> Result<Option<plug::Plug>, BuildError> {
        let Some(pluggable) = self.ram.pluggable() else { return Ok(None) };
        let (plug, handle) = memory::plug(self.ram, pluggable).map_err(refused("memory to plug"))?;
        self.plug = Some(handle);
        Ok(Some(plug))
    }

    /// All that came of it.
    ///
    /// # Errors
    /// [`ConfigError::NoBalloon`], or the host had no timer left.
    pub fn finish(mut self) -> Result<Devices, BuildError> {
        let balloon = self.balloon.take().ok_or(ConfigError::NoBalloon)?;
        let steering = match self.plug.take() {
            None => Steering::by_balloon(balloon),
            Some(plug) => Steering::by_plug(balloon, plug, self.ram.boot()).map_err(refused("a timer"))?,
        };
        self.serve(ThreadName::memory(), Arc::new(Mutex::new(Steered(steering.clone()))));
        let (buses, platform) = self.wiring.finish();
        Ok(Devices {
            buses,
            platform,
            threads: self.threads,
            virtio: self.virtio,
            needs: self.needs,
            steering,
            power: self.power,
            console: self.console,
        })
    }
}

#[cfg(test)]
mod tests {
    use devices::sandbox::Call;
    use devices::testing::note;
    use devices::virtio::mmio;
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::config::{Cpus, MemoryOptions};
    use crate::kvm;

    /// The devices of a VM with `json` beside a balloon; `None` where there is no KVM.
    fn devices(pci: Option<Range<u64>>, json: &str) -> Option<(Devices, Arc<VcpuSet>)> {
        let kvm = Kvm::new().ok()?;
        let limits: Limits = "64M,max=128M".parse().expect("limits");
        let ram = Ram::new(limits.max(), MemoryOptions::default()).expect("guest memory");
        let vm = kvm::create_vm(&kvm, ram.regions()).expect("a VM");
        let vcpu_set = VcpuSet::new(1).expect("a signal");
        let control = Control::new("test".parse().expect("a name"), Cpus::ONE, limits);
        let mut builder = Builder::new(vm, pci, limits, &ram, &control, &vcpu_set).expect("a bus");
        let list = format!(r#"[{{"id": "balloon", "type": "balloon"}}, {json}]"#);
        let list: Vec<DeviceConfig> = serde_json::from_str(&list).expect("a list of devices");
        for device in &list {
            builder.add(device).expect("a device");
        }
        let devices = builder.finish().expect("all of them");
        Some((devices, vcpu_set))
    }

    const NOTE: &str = r#"{"id": "note0", "type": "note", "text": "hello", "file": "/etc/motd"}"#;
    const RNG: &str = r#"{"id": "rng", "type": "rng"}"#;

    /// A device of a kind that nobody knew before: what made it one is its file (`devices::testing::note`),
    /// its variant of `Device`, and its line in `Builder::add`.
    #[test]
    fn a_new_kind_of_device_is_a_file_a_variant_and_a_line() {
        let Some((devices, _)) = devices(None, NOTE) else {
            return eprintln!("SKIPPED: this host has no KVM");
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
        let Some((devices, _)) = found else { return eprintln!("SKIPPED: this host has no KVM") };
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
        let list: Vec<DeviceConfig> =
            more.map(|json| serde_json::from_str(&json).expect("a device")).collect();
        let Ok(kvm) = Kvm::new() else { return eprintln!("SKIPPED: this host has no KVM") };
        let limits: Limits = "64M".parse().expect("limits");
        let ram = Ram::new(limits.max(), MemoryOptions::default()).expect("guest memory");
        let vcpu_set = VcpuSet::new(1).expect("a signal");
        let control = Control::new("test".parse().expect("a name"), Cpus::ONE, limits);
        for (pci, most, why) in [(Some(4 << 30..5 << 30), 31, "PCI bus is full"), (None, 7, "interrupt line")]
        {
            let vm = kvm::create_vm(&kvm, ram.regions()).expect("a VM");
            let mut builder = Builder::new(vm, pci, limits, &ram, &control, &vcpu_set).expect("a bus");
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
            let Some((devices, vcpu_set)) = found else { return eprintln!("SKIPPED: this host has no KVM") };
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
            return eprintln!("SKIPPED: this host has no KVM");
        };
        let threads: Vec<_> = devices.threads.iter().map(|(name, all)| (name.as_str(), all.len())).collect();
        assert_eq!(threads, [("balloon", 2), ("devices", 1), ("slow", 1)]);
    }
}
