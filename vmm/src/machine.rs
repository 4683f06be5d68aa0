//! The life of one VM: made whole or not at all, run once, and told how it ended.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use api::units::Bytes;
use balloon::device::{Balloon, Handle};
use balloon::discard::{self, Discard};
use balloon::mechanism::steering::Steering;
use balloon::plug::{self, Plug};
use devices::platform::{GuestEnd, OnEnd, serial};
use devices::virtio::rng::Rng;
use kvm_ioctls::VmFd;

use crate::api_server;
use crate::arch::x86_64::vcpu::{self, VcpuError};
use crate::arch::x86_64::{acpi, layout, reset};
use crate::boot::kernel::{self, Files, KernelError};
use crate::bus::Buses;
use crate::config::{Backing, Config, Grow, plug_cmdline};
use crate::console::{Console, ConsoleError};
use crate::control::{Control, Parts};
use crate::events::{EventLoop, STACK, Subscriber};
use crate::exit::{self, Exit};
use crate::host::{self, HostCannot};
use crate::kvm::{self, KvmError};
use crate::memory::fault_guard::FaultGuard;
use crate::memory::pluggable::Pluggable;
use crate::memory::{self, MemoryError, Ram};
use crate::sandbox::{self, SandboxError};
use crate::signals::Signals;
use crate::steering::Steered;
use crate::vcpu::Vcpu;
use crate::vcpu_set::VcpuSet;
use crate::wiring::{Wiring, WiringError};

/// Why a VM could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// This host can't run stock guests at all.
    #[error(transparent)]
    HostCannot(#[from] HostCannot),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A device.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The API's socket.
    #[error(transparent)]
    Api(#[from] api_server::BindError),
    /// The walls around the process.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There are no vCPUs.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Guest memory has no place for a table.
    #[error("boot data could not be written to guest memory: {0}")]
    BootData(#[from] vm_memory::GuestMemoryError),
    /// The host has no threads or descriptors left.
    #[error("the host refused {what}: {source}")]
    Host {
        /// What was asked of it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl MachineError {
    /// The process's exit code.
    pub const fn code(&self) -> u8 {
        match self {
            Self::HostCannot(_) => exit::HOST_CANNOT,
            _ => exit::FAILED,
        }
    }
}

/// `map_err` with what was asked of the host.
fn refused(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

/// A VM that is set up whole and has not run yet.
pub struct Machine {
    control: Arc<Control>,
    vcpu_set: Arc<VcpuSet>,
    vcpus: Vec<Vcpu>,
    buses: Arc<Buses>,
    // Held until the end: the terminal and the sockets are given back when they go.
    _console: Console,
    api: Option<api_server::Server>,
    devices: Vec<Subscriber>,
    /// What moves memory, on an event loop of its own.
    memory: Vec<Subscriber>,
    /// The directories that stay reachable; `None` is no sandbox.
    sandbox: Option<Vec<PathBuf>>,
    // Closed last: the vCPUs and the memory slots hang on it.
    _vm: Arc<VmFd>,
}

impl Machine {
    /// Sets up a VM: everything that can fail fails here, before the guest runs.
    ///
    /// # Errors
    /// [`MachineError`] is the sentence for the user.
    pub fn new(config: Config) -> Result<Self, MachineError> {
        Self::with_ports(config, |_| Ok(()))
    }

    /// As [`Machine::new`], with what `add` puts on ports beside the VM's own devices.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn with_ports(
        config: Config,
        add: impl FnOnce(&mut Buses) -> Result<(), WiringError>,
    ) -> Result<Self, MachineError> {
        let kvm_fd = host::open_for_guests()?;
        let ram = Arc::new(ram(&config)?);
        let cmdline = match ram.pluggable() {
            Some(_) => plug_cmdline(&config.cmdline),
            None => config.cmdline.clone(),
        };
        let files = Files { kernel: &config.kernel, initrd: config.initrd.as_deref(), cmdline: &cmdline };
        let entry = kernel::load(files, ram.guest(), ram.boot())?;
        let api = config.socket.as_deref().map(api_server::Server::bind).transpose()?;

        let vm = kvm::create_vm(&kvm_fd, ram.regions())?;
        let vcpu_set = VcpuSet::new(config.cpus.get()).map_err(refused("a signal for its vCPUs"))?;
        let mut wiring = Wiring::new(&vm, ram.guest());
        let power = wiring.interrupt(layout::GED_IRQ)?;
        let console = Console::open(&config.console, wiring.interrupt(layout::COM1_IRQ)?, &vcpu_set)?;
        wiring.ports(layout::COM1, serial::PORTS, console.port.clone())?;
        let ended = Arc::clone(&vcpu_set);
        wiring.power_devices(&(Arc::new(move |end: GuestEnd| ended.end(end.into())) as OnEnd))?;
        add(wiring.buses())?;
        let (balloon, handle) = balloon(&config, &ram).map_err(refused("a balloon"))?;
        let mut memory: Vec<Subscriber> = vec![wiring.virtio(Box::new(balloon))?];
        let rng = wiring.virtio(Box::new(Rng::new()))?;
        let control = Arc::new(Control::new(config.name.clone(), config.cpus, config.limits));
        let (events, agent) = (Arc::clone(control.events()), control.agent().clone());
        let reports = Arc::clone(&events);
        handle.when_reported(move || reports.report_came());
        handle.when_stalled(move || agent.stalls(Instant::now()));
        let mut devices: Vec<Subscriber> = vec![rng];
        if config.agent {
            devices.push(wiring.virtio(Box::new(control.agent().port()))?);
        }
        let steering = match ram.pluggable() {
            None => Steering::by_balloon(handle),
            Some(pluggable) => {
                let (device, plug) = plug(&ram, pluggable).map_err(refused("memory to plug"))?;
                memory.push(wiring.virtio(Box::new(device))?);
                let fault_guard = FaultGuard::watch(pluggable.region(), Arc::clone(&vcpu_set));
                devices.push(Arc::new(Mutex::new(
                    fault_guard.map_err(refused("a handler of memory accesses"))?,
                )));
                Steering::by_plug(handle, plug, ram.boot()).map_err(refused("a timer"))?
            }
        };
        memory.push(Arc::new(Mutex::new(Steered(steering.clone()))));
        let (buses, slots) = wiring.finish();
        acpi::write(ram.guest(), config.cpus, &slots, &domain(&ram))?;
        reset::write(ram.guest())?;

        let buses = Arc::new(buses);
        let vcpus = vcpu::create_all(&kvm_fd, &vm, config.cpus, ram.guest(), entry)?;
        let vcpus = (0..)
            .zip(vcpus)
            .map(|(index, fd)| Vcpu { fd, index, buses: Arc::clone(&buses), vcpu_set: Arc::clone(&vcpu_set) })
            .collect();
        control.attach(Parts { vcpu_set: Arc::clone(&vcpu_set), ram, steering, power });
        if let Some(input) = &console.input {
            devices.push(input.clone());
        }
        let sandbox = config.sandbox.then(|| config.socket_directories());
        Ok(Self {
            control,
            vcpu_set,
            vcpus,
            buses,
            _console: console,
            api,
            devices,
            memory,
            sandbox,
            _vm: vm,
        })
    }

    /// What can be asked of this VM while it runs.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// Runs the VM to its end. Takes over SIGTERM, SIGINT, SIGHUP and SIGQUIT of the process.
    ///
    /// # Errors
    /// When a thread can't be started or the sandbox not be entered; the guest has not run then.
    pub fn run(mut self) -> Result<Exit, MachineError> {
        // Of threads, Landlock reaches those that are started later.
        if let Some(directories) = &self.sandbox {
            sandbox::close_files(directories)?;
        }
        let signals = Signals::take(&self.control).map_err(refused("signals as events"))?;
        self.devices.push(Arc::new(Mutex::new(signals)));
        let devices = EventLoop::start("devices", self.devices).map_err(refused("a thread for devices"))?;
        let memory = EventLoop::start("balloon", self.memory).map_err(refused("a thread for the balloon"))?;
        for vcpu in self.vcpus {
            Builder::new()
                .name(format!("vcpu{}", vcpu.index))
                .stack_size(STACK)
                .spawn(move || vcpu.run())
                .map_err(refused("a thread for a vCPU"))?;
        }
        // Before someone can ask for it, and before the guest makes it long.
        self.control.count_memory().map_err(refused("to count the guest's memory"))?;
        // Last of what can fail but for the sandbox: dropping the server removes its socket.
        let api = self.api.map(|server| serve(server, &self.control)).transpose()?;
        if self.sandbox.is_some()
            && let Err(error) = sandbox::close_calls()
        {
            if let Some(api) = api {
                api.stop();
            }
            return Err(error.into());
        }
        self.control.start();
        let exit = self.vcpu_set.wait_for_end();
        self.control.ended();
        if let Some(api) = api {
            api.stop();
        }
        devices.stop();
        memory.stop();
        // vCPU threads are not waited for at all: one may hang in a write to a console that nobody
        // reads. None can enter the guest again, and what they use stays until the process ends.
        let counts = self.buses.exits();
        tracing::debug!(
            "exits: {} ports ({} unclaimed), {} memory ({} unclaimed)",
            counts.ports,
            counts.unclaimed_ports,
            counts.memory,
            counts.unclaimed_memory
        );
        Ok(exit)
    }
}

/// The API's thread, and the way to end it.
struct ApiThread {
    stop: vmm_sys_util::eventfd::EventFd,
    thread: JoinHandle<io::Result<()>>,
}

impl ApiThread {
    fn stop(self) {
        // The one failure is a full counter, which stops it as well.
        let _ = self.stop.write(1);
        if let Ok(Err(error)) = self.thread.join() {
            tracing::warn!("the API had ended early: {error}");
        }
    }
}

fn serve(server: api_server::Server, control: &Arc<Control>) -> Result<ApiThread, MachineError> {
    let stop = server.stopper().map_err(refused("an event for the API"))?;
    let control = Arc::clone(control);
    let thread = Builder::new()
        .name("api".to_owned())
        .stack_size(STACK)
        .spawn(move || server.run(&control))
        .map_err(refused("a thread for the API"))?;
    Ok(ApiThread { stop, thread })
}

/// What the guest boots with, and room for what it may plug.
fn ram(config: &Config) -> Result<Ram, MemoryError> {
    let (startup, max) = (config.limits.startup(), config.limits.max());
    match config.grow {
        Grow::Plug => Ram::with_pluggable(startup, max.saturating_sub(startup), config.memory),
        Grow::Balloon => Ram::new(max, config.memory),
    }
}

/// The memory of the guest's proximity domain.
fn domain(ram: &Ram) -> Vec<acpi::Domain> {
    let pluggable = ram.pluggable().map(|pluggable| pluggable.region().guest);
    ram.regions()
        .iter()
        .map(|region| acpi::Domain {
            start: region.guest,
            size: region.size,
            pluggable: Some(region.guest) == pluggable,
        })
        .collect()
}

/// A region as [`Discard`] drops its memory, with `host` to do it by.
fn dropped(ram: &Ram, region: &memory::Region, host: *mut u8) -> discard::Region {
    let backing = match ram.backing() {
        Backing::Anonymous => discard::Backing::Anonymous,
        Backing::Memfd => discard::Backing::SharedFile,
        Backing::HugePages2M => discard::Backing::Hugetlb { shared: true, page: Bytes::mib(2) },
    };
    let collapses = ram.collapses().then_some(region.host);
    discard::Region { guest: region.guest, host, len: region.size, backing, collapses }
}

fn balloon(config: &Config, ram: &Ram) -> io::Result<(Balloon, Handle)> {
    let pluggable = ram.pluggable();
    let regions = ram
        .regions()
        .iter()
        .map(|region| match pluggable.filter(|pluggable| pluggable.region().guest == region.guest) {
            // Pages of plugged memory go into the balloon as well.
            Some(pluggable) => dropped(ram, region, pluggable.dropping()),
            None => dropped(ram, region, region.host),
        })
        .collect();
    // SAFETY: the regions are guest RAM, which stays mapped for the life of the process; what is
    // in it belongs to the guest, and nothing here relies on it after set-up.
    let discard = unsafe { Discard::new(regions) };
    let options = config.balloon;
    // Where memory is plugged, nothing is held back at the start.
    let target = if pluggable.is_some() { ram.most() } else { config.limits.startup() };
    let config = balloon::device::Config {
        map: ram.most(),
        target,
        deflate_on_oom: options.deflate_on_oom,
        reporting: options.reporting,
        statistics_interval: options.statistics_interval,
    };
    Balloon::new(config, discard)
}

fn plug(ram: &Ram, pluggable: &Pluggable) -> io::Result<(Plug, plug::Handle)> {
    let region = pluggable.region();
    // Blocks go whole, and what is in one may be the balloon's to advise on.
    let region_dropped = discard::Region { collapses: None, ..dropped(ram, &region, pluggable.dropping()) };
    // SAFETY: as for the balloon.
    let discard = unsafe { Discard::new(vec![region_dropped]) };
    let config = plug::Config {
        address: region.guest,
        size: region.size,
        most: pluggable.most(),
        block: plug::block_size(region.size),
    };
    Plug::new(config, discard, pluggable.set_access()?)
}
