//! Makes the devices that a configuration lists, each by one line for its kind, and gathers what they need:
//! threads to work on, and leave from the sandbox.

mod disk;
mod memory;
mod net;
mod passt;
mod share;
mod virtiofsd;
mod vsock;

pub(crate) use self::disk::open_disk;
pub(crate) use self::passt::GUEST as GUEST_OF_PASST;

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
use devices::virtio::block::{self, disk::DiskError};
use devices::virtio::device::VirtioDevice;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::Incoming;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi::Platform;
use crate::bus::Buses;
use crate::config::{Backing, BalloonOptions, ConfigError, Device, DeviceConfig, SerialOptions, ThreadName};
use crate::console::{self, Console, ConsoleError};
use crate::control::Control;
use crate::control::nets::Nic;
use crate::control::shares::Share;
use crate::events::Subscriber;
use crate::exit::Exit;
use crate::helper::Helper;
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
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network.
    #[error(transparent)]
    Network(#[from] net::NetworkError),
    /// The socket of the socket device.
    #[error(transparent)]
    VsockSocket(#[from] crate::vsock_socket::VsockSocketError),
    /// A shared directory.
    #[error(transparent)]
    Share(#[from] virtiofsd::ShareError),
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
    /// Its disks, those in files.
    pub disks: Vec<block::handle::Handle>,
    /// Its network cards.
    pub nets: Vec<Nic>,
    /// Its shared directories.
    pub shares: Vec<Share>,
    /// What they need of the sandbox.
    pub needs: SandboxNeeds,
    /// Processes that work for them, to be ended with the VM.
    pub helpers: Vec<Arc<Helper>>,
    /// What moves the guest's memory.
    pub steering: Steering,
    /// The line of the power button.
    pub power: EventFd,
    /// Held until the end: the terminal and the socket are given back when it goes.
    pub console: Option<Console>,
    /// Where programs on the host come that want to speak to the guest.
    pub vsock: Option<Arc<Incoming>>,
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
    disks: Vec<block::handle::Handle>,
    nets: Vec<Nic>,
    shares: Vec<Share>,
    needs: SandboxNeeds,
    helpers: Vec<Arc<Helper>>,
    balloon: Option<Handle>,
    plug: Option<plug::Handle>,
    console: Option<Console>,
    vsock: Option<Arc<Incoming>>,
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
        let (wiring, power) = Wiring::new(vm, Arc::clone(ram.guest()), &on_end, control.asleep(), pci)?;
        Ok(Self {
            limits,
            ram,
            control,
            vcpu_set,
            wiring,
            power,
            threads: Threads::new(),
            virtio: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            shares: Vec::new(),
            needs: SandboxNeeds::default(),
            helpers: Vec::new(),
            balloon: None,
            plug: None,
            console: None,
            vsock: None,
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
            Device::Disk(options) => {
                let disk = disk::open(&config.id, options, self.control.cpus())?;
                self.disks.push(disk.handle());
                self.virtio(config, ThreadName::own(&config.id), disk)
            }
            Device::CloudInit(seed) => {
                let disk = disk::seed(&config.id, seed)?;
                self.virtio(config, shared, disk)
            }
            Device::Net(options) => {
                let (net, helper) = net::open(self.control.name(), &config.id, options)?;
                self.help(helper);
                self.nets.push(Nic {
                    id: config.id.clone(),
                    mac: options.mac(self.control.name(), &config.id).to_string(),
                    options: options.clone(),
                    counters: net.counters(),
                });
                self.virtio(config, ThreadName::own(&config.id), net)
            }
            Device::Vsock(options) => {
                let (vsock, socket, needs) = vsock::open(options)?;
                self.needs.add(needs);
                if let Some(socket) = socket {
                    self.serve(ThreadName::own(&config.id), Arc::new(Mutex::new(socket)));
                }
                self.vsock = Some(vsock.incoming());
                self.virtio(config, ThreadName::own(&config.id), vsock)
            }
            Device::Share(options) => {
                let (fs, helper) = share::open(&config.id, options, self.ram)?;
                self.help(Some(helper));
                self.shares.push(Share {
                    id: config.id.clone(),
                    options: options.clone(),
                    serves: fs.serves(),
                });
                self.virtio(config, ThreadName::own(&config.id), fs)
            }
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

    fn help(&mut self, helper: Option<Arc<Helper>>) {
        if let Some(helper) = helper {
            self.needs.add(helper.sandbox_needs());
            self.helpers.push(helper);
        }
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
        let deflated = agent.clone();
        let counted = handle.clone();
        agent.counted_by(move |total| counted.had(total));
        handle.when_stalled(move || agent.stalls(Instant::now()));
        handle.when_taken_back(move || deflated.deflates_on_oom(Instant::now()));
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
            Some(plug) => {
                // Pages of a reserved huge page do not go back before all of it is in the balloon.
                let cushioned = self.ram.backing() != Backing::HugePages2M;
                Steering::by_plug(balloon, plug, self.ram.boot(), cushioned).map_err(refused("a timer"))?
            }
        };
        self.serve(ThreadName::memory(), Arc::new(Mutex::new(Steered(steering.clone()))));
        let (buses, platform) = self.wiring.finish();
        Ok(Devices {
            buses,
            platform,
            threads: self.threads,
            virtio: self.virtio,
            disks: self.disks,
            nets: self.nets,
            shares: self.shares,
            needs: self.needs,
            helpers: self.helpers,
            steering,
            power: self.power,
            console: self.console,
            vsock: self.vsock,
        })
    }
}

#[cfg(test)]
mod tests;
