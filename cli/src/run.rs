//! `ballast run`.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use api::limits::Limits;
use api::runtime;
use api::service_manager;
use tracing::{info, warn};
use vmm::boot::files::BootFiles;
use vmm::config::{
    Backing, BalloonOptions, ConfigError, Console, Cpus, DEFAULT_CMDLINE, Device, DeviceConfig, DiskOptions,
    MemoryOptions, Name, NetOptions, SerialOptions, ServedPort, ShareOptions, Transport, VmConfig,
    VsockOptions, with_words,
};
use vmm::machine::Machine;

use crate::cgroup;
use crate::cloud_init::SeedArgs;
use crate::duration;
use crate::entry::Entry;
use crate::failure::Failure;
use crate::growth;
use crate::journal;
use crate::reservation;
use crate::sentence;
use crate::supervisor;
use crate::unpacking::{KernelCache, finder, unpacking};

/// Run one VM until its guest switches off
#[derive(clap::Args)]
#[command(after_help = "\
The console is on standard output and input; Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends a Ctrl-A.
All else is on standard error.

Where a balancer runs for this user, it is asked for room first: it takes memory from other VMs, or
refuses with the numbers if even that would not do. Without one the VM starts all the same.

Examples:
  ballast run --kernel vmlinuz --initrd initrd.img --memory 512M
  ballast run --name web --kernel vmlinuz --initrd web.cpio.gz --cpus 2 \\
      --memory 256M,min=128M,max=1G,buffer=20%,weight=100 --console file:web.log
  ballast run --kernel vmlinux --memory 1G --hugepages 2M --prefault
  ballast run --config web.toml --console file:web.log
  ballast run --disk debian.qcow2 --memory 1G
  ballast run --kernel vmlinuz --initrd web.cpio.gz --memory 512M --net user,forward=tcp:8080:80

Exit codes:
   0  the guest powered off, or somebody stopped it
   1  ballast failed
   2  the command line was not understood
   3  this host's KVM can't run stock kernels: see `ballast check`
  10  the guest asked for a reboot, and is not to be started again
  11  the guest's kernel panicked
  12  the guest triple-faulted
  13  KVM could not run the guest on
  14  Ctrl-A x on the console")]
pub struct Args {
    /// Read options from this file: TOML with their names, such as `memory = "256M,max=1G"`
    ///
    /// A name has `_` for `-`. A flag is true or false, and what may be given several times is a list. What
    /// is given here as well goes before the file, and so it does for what can't be used together with it.
    /// `ballast check FILE` says everything that is wrong with a file. Paths are as here: one that is
    /// not absolute begins in the directory that ballast is started in.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The kernel: a bzImage (such as /boot/vmlinuz-*), or an uncompressed ELF with a PVH note
    ///
    /// Without it the first disk is booted by its own: the newest entry of its boot loader's (loader/entries), what
    /// its links vmlinuz and initrd.img lead to, or the newest vmlinuz-* in /boot.
    #[arg(long, value_name = "FILE", required_unless_present = "disks")]
    kernel: Option<PathBuf>,
    /// Boot a bzImage as it is: it unpacks itself in the guest
    ///
    /// Otherwise what is packed in it is unpacked on the host, by a process that can do nothing else,
    /// and put at an address of chance as the kernel itself would do.
    #[arg(long)]
    no_unpack: bool,
    /// Where unpacked kernels are kept: a directory, or `off`
    ///
    /// [default: $XDG_CACHE_HOME/ballast/kernels or ~/.cache/ballast/kernels; for root
    /// /var/cache/ballast/kernels]
    #[arg(long, value_name = "DIR", conflicts_with = "no_unpack")]
    kernel_cache: Option<KernelCache>,
    /// The initial RAM file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_CMDLINE, allow_hyphen_values = true)]
    cmdline: String,
    /// Words to put behind the kernel's command line, such as root=/dev/vda
    ///
    /// Where they contain fips=1, the default no longer contains cryptomgr.notests.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    append: String,
    /// Memory: SIZE, then with commas min=SIZE, max=SIZE, buffer=PERCENT%, weight=N
    ///
    /// The guest starts with SIZE. Alone it is static memory, which no balancer touches. With min or
    /// max it is dynamic: a balancer moves it between them, keeps `buffer` percent spare on top of
    /// what the guest uses, and divides by `weight` when memory is short.
    #[arg(long, value_name = "SPEC")]
    memory: Limits,
    /// How the guest gets memory beyond what it starts with
    #[arg(long, value_name = "HOW", default_value = "balloon")]
    grow: GrowBy,
    /// How the guest reaches its devices
    #[arg(long, value_name = "HOW", default_value = "pci")]
    transport: Carrier,
    /// A disk: PATH, then with commas readonly, format=, cache=, backing=, on-error= and limits; once for each disk
    ///
    /// A file of the disk's bytes, a block device, or a qcow2 image (its name ends in .qcow2, or format=qcow2). A
    /// qcow2 image may name another file behind it only with backing=allow. The guest finds the first as /dev/vda, the second as
    /// /dev/vdb and so on; it needs the module virtio_blk. A disk is locked while the VM runs, as QEMU
    /// locks it. One that the guest may write is not cached by the host (cache=direct), so that the guest's
    /// cache is the only one; one that it may only read is, and guests that read the same file share that.
    /// Where the host fails a request, on-error=report tells the guest (an I/O error), on-error=pause pauses the VM until
    /// `ballast resume`; usually it pauses where the host has no room, and reports the rest (on-error=pause-when-full).
    /// Limits are iops=N and bytes-per-second=SIZE, and what passes at once is iops-burst=N and bytes-burst=SIZE.
    #[arg(long = "disk", value_name = "SPEC")]
    disks: Vec<DiskOptions>,
    #[command(flatten)]
    seed: SeedArgs,
    /// What a reboot of the guest does: `restart` starts the VM again, `exit` ends it with 10
    ///
    /// [default: restart where there is a disk, else exit]
    #[arg(long, value_name = "WHAT")]
    on_reboot: Option<OnReboot>,
    /// The process that starts this VM again
    #[arg(long, value_name = "PID", hide = true)]
    supervisor: Option<i32>,
    /// A network: user, tap=NAME, bridge=NAME or fd=N, then with commas mac=, mtu= and more; once for each card
    ///
    /// `user` needs no privileges: the program passt makes the guest's connections, as any program of yours
    /// could make them. The guest has 10.0.2.15 (by DHCP), and reaches what this host reaches, but not its
    /// loopback. With user: forward=tcp:8080:80 leads port 8080 of the host to port 80 of the guest (udp:
    /// too; tcp:127.0.0.1:8080:80 listens at one address), again for each port; dns=ADDRESS is the guest's
    /// name server; loopback makes 10.0.2.2 this host's loopback.
    ///
    /// `tap=NAME` is a tap that is there: `ip tuntap add dev NAME mode tap user $USER` as root makes one.
    /// `bridge=NAME` makes a tap in that bridge of the host, which goes with the VM. It takes root (CAP_NET_ADMIN).
    /// `fd=N` is a tap that is open as descriptor N, with IFF_VNET_HDR.
    ///
    /// packets-per-second=N and bytes-per-second=SIZE hold the card to so much each way, with packets-burst=N and
    /// bytes-burst=SIZE at once. mac=52:54:00:12:34:56 is the card's address (by the VM's name, if not given), mtu=BYTES its largest packet.
    /// The guest needs the module virtio_net.
    #[arg(long = "net", value_name = "SPEC")]
    nets: Vec<NetOptions>,
    /// A directory that the guest shares: DIR, then with commas tag=TAG, readonly; once for each directory
    ///
    /// The guest mounts it by `mount -t virtiofs TAG /mnt`: tags are share0, share1 and so on, if not given. It needs
    /// the module virtiofs. The program virtiofsd does the work, in a sandbox of its own; the one of QEMU 7 (Debian
    /// 12) does it for root alone. Guest memory is then a memfd, which that program maps, so that --grow plug does
    /// not go with it. A comma of the path is written twice.
    #[arg(long = "share", value_name = "SPEC")]
    shares: Vec<ShareOptions>,
    /// Let programs on this host and in the guest speak to each other without a network (virtio-vsock)
    ///
    /// `ballast vsock NAME PORT` speaks to a program that listens in the guest. The guest needs the module
    /// vmw_vsock_virtio_transport.
    #[arg(long)]
    vsock: bool,
    /// A socket at which programs ask for ports of the guest as with Firecracker: `CONNECT PORT`, `OK PORT`
    ///
    /// For `ssh vsock-mux/PATH` of systemd, socat and others that know it. It gives the guest the device of --vsock.
    #[arg(long, value_name = "PATH")]
    vsock_socket: Option<PathBuf>,
    /// A port of this host that the guest may connect to, and the Unix socket that serves it; once for each port
    ///
    /// The guest's programs connect to CID 2. All other ports refuse them. PORT alone is served by PATH_PORT beside
    /// the socket of --vsock-socket PATH.
    #[arg(long, value_name = "PORT:PATH")]
    vsock_serve: Vec<ServedPort>,
    /// vCPUs
    #[arg(long, value_name = "N", default_value = "1")]
    cpus: Cpus,
    /// The VM's name: 1 to 63 of a-z, 0-9 and - [default: vm-PID]
    #[arg(long)]
    name: Option<Name>,
    /// Where the guest's first serial port goes: stdio, file:PATH, socket:PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    console: Console,
    /// What guest memory is made of: private memory, or a memfd that others could map too
    ///
    /// [default: anonymous, or memfd where a directory is shared]
    #[arg(long, value_name = "KIND")]
    memory_backing: Option<MemoryBacking>,
    /// Ask the host for transparent huge pages
    #[arg(long)]
    thp: bool,
    /// Take guest memory from the host's reserved huge pages of this size: 2M
    #[arg(long, value_name = "SIZE", value_parser = Backing::huge_pages, conflicts_with_all = ["memory_backing", "thp"])]
    hugepages: Option<Backing>,
    /// Touch all guest memory before the guest starts
    #[arg(long)]
    prefault: bool,
    /// How often the guest is asked how its memory is; 0 is never
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration::parse)]
    statistics_interval: Duration,
    /// Don't let a guest that runs out of memory take pages back from the balloon
    #[arg(long)]
    no_deflate_on_oom: bool,
    /// Don't let the guest hand over free pages by itself
    #[arg(long)]
    no_free_page_reporting: bool,
    /// Don't give the guest a port on which ballast-agent can call for memory
    #[arg(long)]
    no_agent: bool,
    /// Start without asking the balancer for room
    ///
    /// The VM may then be more than the host has memory for. It is the way out where a balancer is
    /// there and does not answer.
    #[arg(long)]
    no_balancer: bool,
    /// Don't listen on a socket: nobody can look at this VM or steer it
    #[arg(long)]
    no_api: bool,
    /// Keep this process's access to files and system calls: to debug it, or where the kernel has no seccomp
    #[arg(long)]
    no_sandbox: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum GrowBy {
    /// By plugging where the guest has virtio_mem: in its initramfs, built into its kernel, or among the modules of
    /// the disk that it boots from; else by its balloon. `ballast check --kernel FILE --initrd FILE` says which
    Auto,
    /// It boots with max in its memory map, and the balloon holds back what is above SIZE
    Balloon,
    /// It boots with SIZE and plugs the rest: faster, and it can't reach memory that it was not
    /// given; the guest needs the module virtio_mem (Linux 5.17 or later)
    Plug,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum OnReboot {
    /// The VM starts again, with the kernel that is on its disk then
    Restart,
    /// The VM ends
    Exit,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Carrier {
    /// On a PCI bus, with an interrupt for each of their queues; the guest needs the module virtio_pci
    Pci,
    /// By registers in memory, without a bus: the guest starts sooner; it needs the module virtio_mmio
    Mmio,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum MemoryBacking {
    Anonymous,
    Memfd,
}

impl Args {
    /// The VM's name, where the command line gives one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_ref().map(Name::as_str)
    }

    /// What is booted, where that says which devices there are.
    fn boot_files(&self) -> Result<Option<BootFiles>, Failure> {
        if self.grow != GrowBy::Auto || !growth::has_more(&self.memory) {
            return Ok(None);
        }
        if !self.shares.is_empty() {
            info!("it grows by its balloon: who shares a directory must not see memory that is not plugged");
            return Ok(None);
        }
        let (kernel, initrd) = (self.kernel.as_deref(), self.initrd.as_deref());
        let files = BootFiles::find(kernel, initrd, self.disks.first(), Some(&finder()));
        files.map(Some).map_err(Failure::new)
    }

    fn config(self, files: Option<&BootFiles>) -> Result<VmConfig, Failure> {
        let mut devices = self.devices(files).map_err(Failure::usage)?;
        if let Some(seed) = self.seed.seed(self.name.as_ref().map(Name::as_str), self.has_vsock())? {
            // Behind all disks, so that those have the names that they would have without it.
            let id = "cloud-init".parse().map_err(|error: ConfigError| Failure::usage(error))?;
            devices.push(DeviceConfig::new(id, Device::CloudInit(seed)));
        }
        let backing = self.hugepages.unwrap_or(match self.memory_backing {
            Some(MemoryBacking::Anonymous) => Backing::Anonymous,
            None if self.shares.is_empty() => Backing::Anonymous,
            Some(MemoryBacking::Memfd) | None => Backing::Memfd,
        });
        let name = self.name.map_or_else(|| format!("vm-{}", std::process::id()).parse(), Ok);
        let name = name.map_err(|error: ConfigError| Failure::usage(error))?;
        let socket = if self.no_api {
            None
        } else {
            Some(runtime::socket_in(&runtime::create_directory()?, name.as_str())?)
        };
        Ok(VmConfig {
            name,
            kernel: self.kernel,
            finder: Some(finder()),
            unpacking: (!self.no_unpack).then(|| unpacking(self.kernel_cache.as_ref())),
            initrd: self.initrd,
            cmdline: with_words(&self.cmdline, &self.append),
            limits: self.memory,
            cpus: self.cpus,
            memory: MemoryOptions { backing, thp: self.thp, prefault: self.prefault },
            transport: match self.transport {
                Carrier::Pci => Transport::Pci,
                Carrier::Mmio => Transport::Mmio,
            },
            devices,
            socket,
            sandbox: !self.no_sandbox,
        })
    }

    /// Whether another process is to start this VM, and to start it again.
    fn restarts(&self) -> bool {
        let usual = if self.disks.is_empty() { OnReboot::Exit } else { OnReboot::Restart };
        self.supervisor.is_none() && self.on_reboot.unwrap_or(usual) == OnReboot::Restart
    }

    /// Whether the guest is to plug what it gets beyond its startup memory.
    fn plugs(&self, files: Option<&BootFiles>) -> bool {
        match (self.grow, files) {
            (GrowBy::Plug, _) => true,
            (GrowBy::Balloon, _) | (GrowBy::Auto, None) => false,
            (GrowBy::Auto, Some(files)) => {
                growth::has_more(&self.memory) && {
                    let unpacking = (!self.no_unpack).then(|| unpacking(self.kernel_cache.as_ref()));
                    let (initrd, on_disk) = (files.initrd.as_ref(), files.memory_driver.as_deref());
                    let growth = growth::of_guest(&files.kernel, initrd, on_disk, |file| {
                        let prepared = unpacking.map(|unpacking| unpacking.prepare(file)).transpose()?;
                        Ok(prepared.map(|(kernel, _)| kernel))
                    });
                    info!("{growth}");
                    growth.is_plug()
                }
            }
        }
    }

    fn has_vsock(&self) -> bool {
        self.vsock || self.vsock_socket.is_some() || !self.vsock_serve.is_empty()
    }

    /// The devices that the flags ask for, in the order in which the guest finds them.
    fn devices(&self, files: Option<&BootFiles>) -> Result<Vec<DeviceConfig>, ConfigError> {
        let balloon = BalloonOptions {
            deflate_on_oom: !self.no_deflate_on_oom,
            reporting: !self.no_free_page_reporting,
            statistics_interval: self.statistics_interval,
        };
        let mut devices = vec![
            ("serial", Device::Serial(SerialOptions { console: self.console.clone() })),
            ("balloon", Device::Balloon(balloon)),
            ("rng", Device::Rng),
        ];
        if !self.no_agent {
            devices.push(("agent", Device::Agent));
        }
        if self.plugs(files) {
            devices.push(("memory", Device::Memory));
        }
        if self.has_vsock() {
            devices.push((
                "vsock",
                Device::Vsock(VsockOptions {
                    serve: self.vsock_serve.clone(),
                    socket: self.vsock_socket.clone(),
                }),
            ));
        }
        let disks = (0..)
            .zip(&self.disks)
            .map(|(number, disk)| (format!("disk{number}"), Device::Disk(disk.clone())));
        let nets =
            (0..).zip(&self.nets).map(|(number, net)| (format!("net{number}"), Device::Net(net.clone())));
        let shares = (0..)
            .zip(&self.shares)
            .map(|(number, share)| (format!("share{number}"), Device::Share(share.clone())));
        let devices = devices.into_iter().map(|(id, device)| (id.to_owned(), device));
        let devices = devices.chain(disks).chain(nets).chain(shares);
        devices.map(|(id, device)| Ok(DeviceConfig::new(id.parse()?, device))).collect()
    }
}

pub fn run(args: Args) -> Result<ExitCode, Failure> {
    if args.restarts() {
        let named = args.name.is_some();
        drop(args);
        give_back_heap();
        return supervisor::run(named);
    }
    args.supervisor.map_or(Ok(()), supervisor::end_with)?;
    // Without a socket no balancer ever sees it.
    let asks = !(args.no_balancer || args.no_api);
    let files = args.boot_files()?;
    let config = args.config(files.as_ref())?;
    if let Some(warning) = cgroup::warning(config.limits, config.memory.backing, cgroup::limit()) {
        warn!("{warning}");
    }
    if let Some(warning) = growth::starts_with_too_little(config.limits, config.plugs_memory()) {
        warn!("{warning}");
    }
    let reserved = if asks {
        reservation::reserve(config.name.as_str(), at_the_start(&config), config.memory.backing)?
    } else {
        None
    };
    let made = match files {
        Some(files) => Machine::with_files(config, files),
        None => Machine::new(config),
    };
    let machine = made.inspect_err(|_| {
        if let Some(reservation) = reserved {
            reservation.give_back();
        }
    })?;
    give_back_heap();
    let manager = service_manager::connect().unwrap_or_else(|error| {
        warn!("cannot tell the service manager when this VM runs: {error}");
        None
    });
    let exit = machine.run_telling(|| {
        if let Some(journal) = journal::opened() {
            journal.send(tracing::Level::INFO, &Entry::new("its guest runs").of_kind("started"));
        }
        if let Some(manager) = manager {
            // Who does not read it waits in vain, and ends this process then. The sandbox lets files be written.
            let _ = File::from(OwnedFd::from(manager)).write_all(b"READY=1\nSTATUS=its guest runs");
        }
    })?;
    sentence::befell("ended", &exit);
    Ok(ExitCode::from(exit.code()))
}

/// What it holds at its start: a balloon takes back what was touched before its driver runs, and not sooner.
fn at_the_start(config: &VmConfig) -> Limits {
    if config.memory.prefault && !config.plugs_memory() {
        config.limits.starting_full()
    } else {
        config.limits
    }
}

/// Has all threads share one heap, before there is a second: each of its own would take page tables, and hold memory
/// that the others can't use. A VM's threads seldom allocate at all.
pub fn share_one_heap() {
    // SAFETY: a number for the allocator, at any time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives the host what reading the command line took on the heap: it would
/// stay with this VM for its whole life, and with every VM on the host.
fn give_back_heap() {
    // SAFETY: releases memory that the allocator itself holds free; it may be called at any time.
    unsafe { libc::malloc_trim(0) };
}
