//! The life of one VM: made whole or not at all, run once, and told how it ended.

use std::io;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use api::units::Bytes;
use devices::pci::access::ECAM_SIZE;
use devices::sandbox::SandboxNeeds;
use devices::virtio::block::handle::Handle;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VmFd;

use crate::api_server;
use crate::arch::x86_64::layout::{self, TooMuchMemory};
use crate::arch::x86_64::vcpu::{self, VcpuError};
use crate::arch::x86_64::{acpi, cpuid, reset, smbios};
use crate::boot::files::{BootFiles, BootFilesError};
use crate::boot::kernel::{self, Boot, KernelError};
use crate::boot::unpacked;
use crate::builder::{BuildError, Builder, Threads};
use crate::bus::Buses;
use crate::config::{ConfigError, ThreadName, Transport, VmConfig};
use crate::console::Console;
use crate::control::{Control, Parts};
use crate::disk_failures::DiskFailures;
use crate::events::{self, EventThread};
use crate::exit::{self, Exit};
use crate::helper::Helper;
use crate::host::{self, HostCannot};
use crate::kvm::{self, KvmError};
use crate::memory::fault_guard::FaultGuard;
use crate::memory::{MemoryError, Ram};
use crate::sandbox::{self, SandboxError};
use crate::signals::Signals;
use crate::vcpu::Vcpu;
use crate::vcpu_set::VcpuSet;
use crate::wiring::WiringError;

/// Why a VM could not be made or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// This host can't run stock guests at all.
    #[error(transparent)]
    HostCannot(#[from] HostCannot),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There is nothing to boot.
    #[error(transparent)]
    BootFiles(#[from] BootFilesError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// More memory than this host can give to a guest.
    #[error(transparent)]
    TooMuchMemory(#[from] TooMuchMemory),
    /// A device.
    #[error(transparent)]
    Build(#[from] BuildError),
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
    ram: Arc<Ram>,
    vcpu_set: Arc<VcpuSet>,
    vcpus: Vec<Vcpu>,
    buses: Arc<Buses>,
    // Held until the end: the terminal and the sockets are given back when they go.
    console: Option<Console>,
    api: Option<api_server::Server>,
    threads: Threads,
    helpers: Vec<Arc<Helper>>,
    disks: Vec<Handle>,
    /// What stays possible; `None` is no sandbox.
    sandbox: Option<SandboxNeeds>,
    // Closed last: the vCPUs and the memory slots hang on it.
    _vm: Arc<VmFd>,
}

impl Machine {
    /// Sets up a VM: everything that can fail fails here, before the guest runs.
    ///
    /// # Errors
    /// [`MachineError`] is the sentence for the user.
    pub fn new(config: VmConfig) -> Result<Self, MachineError> {
        Self::with_ports(config, |_| Ok(()))
    }

    /// As [`Machine::new`], where somebody has looked already for what the configuration boots.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn with_files(config: VmConfig, files: BootFiles) -> Result<Self, MachineError> {
        Self::make(config, Some(files), |_| Ok(()))
    }

    /// As [`Machine::new`], with what `add` puts on ports beside the VM's own devices.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn with_ports(
        config: VmConfig,
        add: impl FnOnce(&mut Buses) -> Result<(), WiringError>,
    ) -> Result<Self, MachineError> {
        Self::make(config, None, add)
    }

    fn make(
        mut config: VmConfig,
        files: Option<BootFiles>,
        add: impl FnOnce(&mut Buses) -> Result<(), WiringError>,
    ) -> Result<Self, MachineError> {
        config.check()?;
        let kvm_fd = host::open_for_guests()?;
        vcpu::check(config.cpus, kvm_fd.get_max_vcpus())?;
        let files = files.map_or_else(|| BootFiles::of(&config), Ok)?;
        config.cmdline = files.cmdline(&config.cmdline);
        let supported = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm::refused("tell what CPUID it supports"))?;
        let has_pci = config.transport == Transport::Pci;
        let (boot, more) = memory(&config);
        let end = layout::memory_end(boot, more, cpuid::address_bits(&supported), has_pci)?;
        let pci = has_pci.then(|| layout::pci_window(end));
        // What this takes of memory is given back before the guest has any.
        let unpacking = config.unpacking.as_ref();
        let unpacked = unpacking.and_then(|unpacking| unpacked::prepare(&files.kernel, unpacking));
        let ram = Arc::new(Ram::with_pluggable(boot, more, config.memory)?);
        for hindrance in config.hindrances() {
            tracing::warn!("{hindrance}");
        }
        let boot = Boot {
            kernel: &files.kernel,
            unpacked: unpacked.as_ref(),
            initrd: files.initrd.as_ref(),
            cmdline: &config.kernel_cmdline(),
            reserved: if pci.is_some() { layout::ECAM.0..layout::ECAM.0 + ECAM_SIZE } else { 0..0 },
        };
        let ((entry, api), vm) = beside(
            // Mostly asleep: KVM starts a thread of its own, which has to wait until all processors have taken
            // notice that it joins this process's control groups.
            || kvm::create_vm(&kvm_fd, ram.regions()),
            || {
                let entry = kernel::load(&boot, ram.guest(), ram.boot())?;
                let api = config.socket.as_deref().map(api_server::Server::bind).transpose()?;
                Ok((entry, api))
            },
        )?;
        drop((unpacked, files));
        let vcpu_set = VcpuSet::new(config.cpus.get()).map_err(refused("a signal for its vCPUs"))?;
        let control = Arc::new(Control::new(config.name.clone(), config.cpus, config.limits));
        let mut builder = Builder::new(Arc::clone(&vm), pci, config.limits, &ram, &control, &vcpu_set)?;
        add(builder.buses()).map_err(BuildError::from)?;
        for device in &config.devices {
            builder.add(device)?;
        }
        let devices = builder.finish()?;
        acpi::write(ram.guest(), config.cpus, &devices.platform, &domain(&ram))?;
        smbios::write(ram.guest(), &config.name)?;
        reset::write(ram.guest())?;

        let buses = Arc::new(devices.buses);
        let vcpus = vcpu::create_all(&vm, &supported, config.cpus, ram.guest(), entry)?;
        let vcpus = (0..=u8::MAX)
            .zip(vcpus)
            .map(|(index, fd)| Vcpu { fd, index, buses: Arc::clone(&buses), vcpu_set: Arc::clone(&vcpu_set) })
            .collect();
        control.attach(Parts {
            vcpu_set: Arc::clone(&vcpu_set),
            ram: Arc::clone(&ram),
            virtio: devices.virtio,
            disks: devices.disks.clone(),
            steering: devices.steering,
            power: devices.power,
            console: devices.console.as_ref().map(|console| Arc::clone(&console.port)),
            vsock: devices.vsock,
            nets: devices.nets,
            shares: devices.shares,
            attachments: devices.console.as_ref().map(|console| Arc::clone(&console.attachments)),
        });
        let mut needs = devices.needs;
        needs.remove.extend(config.socket);
        Ok(Self {
            control,
            ram,
            vcpu_set,
            vcpus,
            buses,
            console: devices.console,
            api,
            threads: devices.threads,
            helpers: devices.helpers,
            disks: devices.disks,
            sandbox: config.sandbox.then_some(needs),
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
    pub fn run(self) -> Result<Exit, MachineError> {
        self.run_telling(|| ())
    }

    /// As [`Machine::run`]; calls `started` once the vCPUs run and the API answers, from within the sandbox.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn run_telling(mut self, started: impl FnOnce()) -> Result<Exit, MachineError> {
        // Of threads, Landlock reaches those that are started later.
        if let Some(needs) = &self.sandbox {
            sandbox::close_files(needs)?;
        }
        let signals = Signals::take(&self.control).map_err(refused("signals as events"))?;
        let fault_guard = FaultGuard::watch(self.ram.regions(), Arc::clone(&self.vcpu_set))
            .map_err(refused("a handler of memory accesses"))?;
        let shared = self.threads.entry(ThreadName::shared()).or_default();
        shared.push(Arc::new(Mutex::new(signals)));
        shared.push(Arc::new(Mutex::new(fault_guard)));
        shared.push(Arc::new(Mutex::new(DiskFailures::new(&self.control, self.disks))));
        let vcpu_set = &self.vcpu_set;
        let mut loops = Vec::new();
        for (name, subscribers) in self.threads {
            let started = EventThread::start(name.as_str(), subscribers, vcpu_set);
            loops.push(started.map_err(refused("a thread for devices"))?);
        }
        if let Some(console) = &mut self.console {
            console.start(vcpu_set).map_err(refused("a thread for the console"))?;
        }
        for vcpu in self.vcpus {
            events::spawn(&format!("vcpu{}", vcpu.index), vcpu_set, move || {
                vcpu.run();
                Ok(())
            })
            .map_err(refused("a thread for a vCPU"))?;
        }
        // It counts when someone asks: a first count now would only keep the guest waiting.
        self.control.count_memory().map_err(refused("to count the guest's memory"))?;
        // Last of what can fail but for the sandbox: dropping the server removes its socket.
        let api = self.api.map(|server| serve(server, &self.control, vcpu_set)).transpose()?;
        if let Some(needs) = &self.sandbox
            && let Err(error) = sandbox::close_calls(needs)
        {
            if let Some(api) = api {
                api.stop();
            }
            return Err(error.into());
        }
        self.control.start();
        started();
        let exit = self.vcpu_set.wait_for_end();
        self.control.ended();
        if let Some(api) = api {
            api.stop();
        }
        if let Some(console) = &self.console {
            console.finish(&exit);
        }
        loops.into_iter().for_each(EventThread::stop);
        self.helpers.iter().for_each(|helper| helper.end());
        // vCPU threads are not waited for. None can enter the guest again, and what they use stays until the process ends.
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
    thread: JoinHandle<()>,
}

impl ApiThread {
    fn stop(self) {
        // The one failure is a full counter, which stops it as well.
        let _ = self.stop.write(1);
        // A panic ends the process.
        let _ = self.thread.join();
    }
}

fn serve(
    server: api_server::Server,
    control: &Arc<Control>,
    vcpu_set: &Arc<VcpuSet>,
) -> Result<ApiThread, MachineError> {
    let stop = server.stopper().map_err(refused("an event for the API"))?;
    let control = Arc::clone(control);
    let thread = events::spawn("api", vcpu_set, move || server.run(&control))
        .map_err(refused("a thread for the API"))?;
    Ok(ApiThread { stop, thread })
}

/// Makes a VM on a thread of its own while `prepare` works on this one, or after it where no thread is to be had.
///
/// # Errors
/// What `prepare` met; else what `create_vm` did.
fn beside<T>(
    create_vm: impl Fn() -> Result<Arc<VmFd>, KvmError> + Sync,
    prepare: impl FnOnce() -> Result<T, MachineError>,
) -> Result<(T, Arc<VmFd>), MachineError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("create".to_owned()).stack_size(events::STACK);
        let creation = thread.spawn_scoped(scope, &create_vm);
        let prepared = prepare()?;
        let vm = match creation {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(_) => create_vm(),
        };
        Ok((prepared, vm?))
    })
}

/// What the guest boots with, and what it may plug.
fn memory(config: &VmConfig) -> (Bytes, Bytes) {
    let (startup, max) = (config.limits.startup(), config.limits.max());
    if config.plugs_memory() { (startup, max.saturating_sub(startup)) } else { (max, Bytes::ZERO) }
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn of_two_errors_the_kernels_file_is_told_first() {
        let no_vm = || Err(KvmError { what: "create a VM", source: kvm_ioctls::Error::new(libc::EBUSY) });
        let no_kernel = || Err::<(), _>(KernelError::NotAKernel("/etc/motd".into()).into());
        let error = beside(no_vm, no_kernel).expect_err("neither").to_string();
        assert!(error.contains("/etc/motd"), "{error}");
        let error = beside(no_vm, || Ok(())).expect_err("no VM").to_string();
        assert!(error.contains("create a VM"), "{error}");
    }

    /// Each waits for the other.
    #[test]
    fn a_vm_is_made_while_its_kernel_is_loaded() {
        let both = Barrier::new(2);
        let error = beside(
            || {
                both.wait();
                Err(KvmError { what: "create a VM", source: kvm_ioctls::Error::new(libc::EBUSY) })
            },
            || {
                both.wait();
                Ok(())
            },
        );
        assert!(error.is_err());
    }
}
