//! What can be asked of a running VM from outside: the API and signals end up here.

pub mod disks;
mod error;
pub mod nets;
pub mod shares;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant, UNIX_EPOCH};

use api::agent::AgentStatus;
use api::limits::Limits;
use api::status::{ConsoleStatus, MemoryStatus, Pauser, VmState, VmStatus};
use api::units::Bytes;
use balloon::mechanism::steering::{Steering, SteeringError};
use devices::platform::serial::Port;
use devices::virtio::block::handle::Handle as Disk;
use devices::virtio::vsock::Incoming;
use kvm_ioctls::VcpuFd;
use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::EventFd;

use crate::agent::Agent;
use crate::config::{Cpus, Name};
use crate::console::{Attachments, Mode, Place};
use crate::event_stream::{EventStream, Subscription};
use crate::exit::Exit;
use crate::inspect::{self, MemoryMap, TranslateRequest, Translation};
use crate::memory::Ram;
use crate::state::{self, Change};
use crate::vcpu_set::{PATIENCE, Standing, Stuck, VcpuSet, VisitError};
use crate::wiring::{self, Virtio};

pub use error::ControlError;

/// What a control needs of a VM that has been set up.
pub struct Parts {
    /// Its vCPUs.
    pub vcpu_set: Arc<VcpuSet>,
    /// Its memory.
    pub ram: Arc<Ram>,
    /// Its devices that have queues.
    pub virtio: Vec<Virtio>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its network cards.
    pub nets: Vec<nets::Nic>,
    /// Its shared directories.
    pub shares: Vec<shares::Share>,
    /// What moves its memory.
    pub steering: Steering,
    /// The interrupt line of the power button.
    pub power: EventFd,
    /// Its serial port, where it has one.
    pub console: Option<Arc<Port>>,
    /// Where programs on the host come that want to speak to the guest, where it has a socket device.
    pub vsock: Option<Arc<Incoming>>,
    /// Where clients are attached to that.
    pub attachments: Option<Arc<Attachments>>,
}

/// One VM, as seen by whoever steers it. Shared by the API, signals and the machine.
pub struct Control {
    name: Name,
    cpus: Cpus,
    map: Bytes,
    started: Instant,
    /// A VM that is to be paused counts as paused here from the moment on in which that was decided.
    state: Mutex<VmState>,
    limits: Mutex<Limits>,
    /// How often the limits were changed.
    limits_changes: AtomicU64,
    /// When this VM was made, in nanoseconds of the epoch: no other of its name was then.
    life: u64,
    /// The guest says that it sleeps.
    asleep: Arc<AtomicBool>,
    events: Arc<EventStream>,
    agent: Agent,
    parts: OnceLock<Parts>,
}

impl Control {
    /// The control of a VM that has not been set up yet.
    pub fn new(name: Name, cpus: Cpus, limits: Limits) -> Self {
        let events = Arc::new(EventStream::default());
        Self {
            name,
            cpus,
            map: limits.max(),
            started: Instant::now(),
            state: Mutex::new(VmState::Created),
            limits: Mutex::new(limits),
            limits_changes: AtomicU64::new(0),
            life: UNIX_EPOCH.elapsed().map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)),
            asleep: Arc::new(AtomicBool::new(false)),
            agent: Agent::new(Arc::clone(&events)),
            events,
            parts: OnceLock::new(),
        }
    }

    /// Where it is noted that the guest sleeps.
    pub fn asleep(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.asleep)
    }

    /// What it is called.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// How many vCPUs it has.
    pub fn cpus(&self) -> Cpus {
        self.cpus
    }

    /// Hands over what the VM is made of. Only the first call counts.
    pub fn attach(&self, parts: Parts) {
        let (steering, events) = (parts.steering.clone(), Arc::clone(&self.events));
        parts.vcpu_set.when_changed(move |standing| {
            if standing == Standing::Held {
                steering.rest(true);
            }
            events.wake();
        });
        let _ = self.parts.set(parts);
    }

    /// Where the VM stands, for whoever changes that.
    fn state(&self) -> MutexGuard<'_, VmState> {
        let mut state = self.state.lock();
        if state.paused_by().is_some() && matches!(self.standing(), Some(Standing::Running { .. })) {
            // A vCPU did not come out.
            *state = VmState::Running;
        }
        state
    }

    /// Where the VM stands, for whoever looks: it is paused once all of its vCPUs stand still.
    fn state_seen(&self) -> VmState {
        let state = *self.state();
        if self.standing() == Some(Standing::Holding) { VmState::Running } else { state }
    }

    fn standing(&self) -> Option<Standing> {
        self.parts.get().map(|parts| parts.vcpu_set.standing())
    }

    /// The guest's agent, heard where its device is wired up.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// What happens to the guest's memory, for those who wait for it.
    pub fn events(&self) -> &Arc<EventStream> {
        &self.events
    }

    /// A place among the readers of the events; `None` where all are taken.
    pub fn subscribe(&self) -> Option<Subscription> {
        self.events.subscribe(self.agent_status())
    }

    fn agent_status(&self) -> Option<AgentStatus> {
        self.agent.status(Instant::now())
    }

    /// Has a thread count what the host holds of the guest's memory: who asks for it never waits long.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn count_memory(&self) -> io::Result<()> {
        self.parts.get().map_or(Ok(()), |parts| parts.ram.count())
    }

    /// Lets the vCPUs run for the first time.
    pub fn start(&self) {
        let mut state = self.state();
        if let (VmState::Created, Some(parts)) = (*state, self.parts.get()) {
            parts.vcpu_set.run();
            *state = VmState::Running;
        }
    }

    /// Takes note that the VM has ended.
    pub fn ended(&self) {
        *self.state.lock() = VmState::Stopped;
    }

    /// What this VM is and where it stands.
    pub fn status(&self) -> VmStatus {
        VmStatus {
            name: self.name.as_str().to_owned(),
            pid: std::process::id(),
            state: match self.state_seen() {
                VmState::Running if self.asleep.load(Ordering::Relaxed) => VmState::Sleeping,
                state => state,
            },
            cpus: self.cpus.get(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            console: self.console(),
            disks: self.disks(),
            nets: self.nets(),
            shares: self.shares(),
        }
    }

    fn console(&self) -> Option<ConsoleStatus> {
        let counts = self.parts.get()?.console.as_ref()?.output_counts();
        Some(ConsoleStatus {
            written: Bytes(counts.written),
            waiting: Bytes(counts.waiting),
            lost: Bytes(counts.lost),
        })
    }

    /// A place for one more client at the console.
    ///
    /// # Errors
    /// There is none, or not yet, or another client writes.
    pub fn attach_to_console(&self, mode: Mode) -> Result<Place, ControlError> {
        let parts = self.parts.get().and_then(|parts| parts.attachments.as_ref());
        Ok(parts.ok_or(ControlError::NoConsole)?.place(mode)?)
    }

    /// Where programs on the host come that want to speak to the guest.
    ///
    /// # Errors
    /// It has no socket device.
    pub fn vsock(&self) -> Result<&Arc<Incoming>, ControlError> {
        self.parts.get().and_then(|parts| parts.vsock.as_ref()).ok_or(ControlError::NoVsock)
    }

    /// Everything about this VM's memory now.
    pub fn memory(&self) -> MemoryStatus {
        let limits = *self.limits.lock();
        let Some(parts) = self.parts.get() else {
            return MemoryStatus::before_the_start(limits, self.map);
        };
        let held = parts.ram.held().inspect_err(|error| {
            // The first count goes on.
            if error.kind() != io::ErrorKind::WouldBlock {
                tracing::warn!("what the host holds of the guest's memory can't be counted: {error}");
            }
        });
        let held = held.ok();
        let steering = &parts.steering;
        let balloon = steering.balloon();
        MemoryStatus {
            limits,
            target: steering.target(),
            actual: steering.actual(),
            given: Some(steering.given()),
            most: Some(steering.most()),
            settled: balloon.settled(),
            followed: Some(balloon.followed()),
            paused_by: self.state_seen().paused_by(),
            host_rss: held.map(|held| held.resident),
            host_huge: held.map(|held| held.huge),
            driver: balloon.driver(),
            report: balloon.report(),
            agent: self.agent_status(),
            counters: balloon.counters(),
            plug: steering.plug(),
            cushion: steering.cushion(),
            oom_deflate: balloon.oom_deflate(),
        }
    }

    /// Has the guest asked for a report where its newest is older than `max_age`. Returns whether one can
    /// be expected: then whoever listens to the [`EventStream`] is woken when it is there.
    pub fn expects_report(&self, max_age: Duration) -> bool {
        // A guest that stands still answers nobody, and would pass for silent.
        let (Some(parts), VmState::Running) = (self.parts.get(), *self.state()) else { return false };
        let balloon = parts.steering.balloon();
        if balloon.report_age().is_some_and(|age| age <= max_age) {
            return false;
        }
        // First: the report may be there before the question is out.
        self.events.expect_report();
        balloon.ask_for_report()
    }

    /// Where this VM's memory lies in this process.
    pub fn memory_map(&self) -> MemoryMap {
        let regions = self.parts.get().map(|parts| parts.ram.regions().iter().map(Into::into).collect());
        MemoryMap { regions: regions.unwrap_or_default() }
    }

    /// Has a vCPU say how it sees a guest virtual address; it leaves the guest for a moment. What it says is
    /// got from what this returns, by whoever has waited so long; whoever listens to the [`EventStream`] is
    /// woken when it is there.
    ///
    /// # Errors
    /// [`ControlError::State`] before the VM runs and after it; [`ControlError::NoSuchVcpu`];
    /// [`ControlError::Host`] where the vCPU does not come within [`PATIENCE`], or KVM refuses.
    pub fn translate(
        self: &Arc<Self>,
        request: TranslateRequest,
    ) -> Result<impl FnMut(Duration) -> Option<Result<Translation, ControlError>> + use<>, ControlError> {
        let refused = |state| ControlError::State { state, action: "translate addresses" };
        let vcpu_set = match (self.state_seen(), self.parts.get()) {
            (state @ VmState::Created, _) | (state, None) => return Err(refused(state)),
            (_, Some(parts)) => Arc::clone(&parts.vcpu_set),
        };
        let (sender, seen) = mpsc::sync_channel(1);
        let events = Arc::clone(&self.events);
        let visit = move |vcpu: &VcpuFd| {
            // Whoever asked may have given up by now.
            let _ = sender.send(inspect::translate(vcpu, request));
            events.wake();
        };
        vcpu_set.visit(request.cpu, Box::new(visit)).map_err(|error| match error {
            VisitError::Ended => refused(VmState::Stopped),
            VisitError::NoSuchVcpu(_) => ControlError::NoSuchVcpu(error),
        })?;
        Ok(move |waited| match seen.try_recv() {
            Ok(seen) => Some(seen.map_err(|error| {
                ControlError::Host(format!("KVM refused to translate an address: {error}"))
            })),
            Err(_) if vcpu_set.has_ended() => Some(Err(refused(VmState::Stopped))),
            Err(mpsc::TryRecvError::Empty) if waited < PATIENCE => None,
            Err(_) => Some(Err(ControlError::Host(Stuck(request.cpu).to_string()))),
        })
    }

    /// What its administrator allows it.
    pub fn limits(&self) -> Limits {
        *self.limits.lock()
    }

    /// Which life of the VM this is, and how often its limits were changed in it.
    pub fn limits_generation(&self) -> (u64, u64) {
        (self.life, self.limits_changes.load(Ordering::Relaxed))
    }

    /// Asks the guest to have `target`.
    ///
    /// # Errors
    /// [`ControlError::OutsideLimits`], and [`ControlError::NoDriver`] where nothing would follow.
    pub fn set_target(&self, target: Bytes) -> Result<(), ControlError> {
        // Held until the target is set, so that it can't slip past new limits.
        let limits = self.limits.lock();
        let (min, max) = (limits.min(), limits.max());
        if !(min..=max).contains(&target) {
            return Err(ControlError::OutsideLimits { target, min, max });
        }
        let parts = self.parts("have a target")?;
        parts.steering.set_target(target.page_floor()).map_err(|error| match error {
            SteeringError::NoBalloon => ControlError::NoDriver,
            SteeringError::NoPlug { .. } => ControlError::CanNotGrow(error),
            SteeringError::OutOfMap { .. } => ControlError::OutsideLimits { target, min, max },
        })
    }

    /// Sets new limits; a target outside them moves to the nearest that is inside.
    ///
    /// # Errors
    /// [`ControlError::BeyondMap`] when max is more than the mapping.
    pub fn set_limits(&self, limits: Limits) -> Result<(), ControlError> {
        if limits.max() > self.map {
            return Err(ControlError::BeyondMap { max: limits.max(), map: self.map });
        }
        let mut current = self.limits.lock();
        if *current != limits {
            self.limits_changes.fetch_add(1, Ordering::Relaxed);
        }
        *current = limits;
        if let Some(parts) = self.parts.get() {
            parts.steering.set_max(limits.max());
            let target = parts.steering.target();
            let inside = limits.clamp(target);
            if inside != target {
                // A driver that has yet to come must find it. Limits lie in the map, and so does this.
                let _ = parts.steering.retarget(inside.page_floor());
            }
        }
        Ok(())
    }

    /// Stops the vCPUs; [`paused`](Self::paused) tells when all of them stand still. An operator may also
    /// take over a pause of the balancer's, which then no longer ends it; see [`state`].
    ///
    /// # Errors
    /// [`ControlError::State`] unless the VM runs, or `by` may take its pause over, or has made it.
    pub fn pause(&self, by: Pauser) -> Result<(), ControlError> {
        self.change(|state| state::pause(state, by))
    }

    /// What came of [`pause`](Self::pause); `None` while not all vCPUs stand still. Whoever listens to the
    /// [`EventStream`] is woken when that changes.
    ///
    /// # Errors
    /// [`ControlError::Host`] where a vCPU does not come within [`PATIENCE`], and the VM runs on;
    /// [`ControlError::Resumed`] and [`ControlError::State`] where it was resumed meanwhile, or has ended.
    pub fn paused(&self) -> Option<Result<(), ControlError>> {
        // Held over the drain, so that nobody resumes in between and leaves a VM that runs with drained devices.
        let _state = self.state();
        Some(match self.standing()? {
            Standing::Holding => return None,
            Standing::Held => {
                self.drain();
                Ok(())
            }
            Standing::Running { stuck: Some(stuck) } => Err(ControlError::Host(stuck.to_string())),
            Standing::Running { stuck: None } => Err(ControlError::Resumed),
            Standing::Ended => Err(ControlError::State { state: VmState::Stopped, action: "be paused" }),
        })
    }

    /// Lets the VM run on after a [`pause`](Self::pause) that nobody was told of.
    pub fn abandon_pause(&self, by: Pauser) {
        if matches!(self.standing(), Some(Standing::Holding | Standing::Held)) {
            // It may not be this one's to end any more.
            let _ = self.resume(by);
        }
    }

    /// Has no device take a request from its queues any more, and none in flight. Not under the vCPUs' lock: a
    /// device that ends the VM takes that one while it holds its own.
    fn drain(&self) {
        for device in self.parts.get().iter().flat_map(|parts| &parts.virtio) {
            wiring::lock(device).drain();
        }
    }

    /// Lets paused vCPUs run on.
    ///
    /// # Errors
    /// [`ControlError::State`] unless the VM is paused and `by` may end that.
    pub fn resume(&self, by: Pauser) -> Result<(), ControlError> {
        self.change(|state| state::resume(state, by))
    }

    /// Presses the power button: a guest that listens shuts down in its own time.
    ///
    /// # Errors
    /// [`ControlError::State`] unless the VM runs.
    pub fn power_button(&self) -> Result<(), ControlError> {
        const ACTION: &str = "take a press of the power button";
        let state = self.state();
        match self.parts.get() {
            Some(parts) if *state == VmState::Running => {
                // The one failure is a full counter: a press that is pending already.
                let _ = parts.power.write(1);
                // The button's own interrupt wakes no Linux that sleeps (drivers/acpi/evged.c does not ask for
                // it); the serial port's does where its terminal may wake the guest.
                if let Some(port) = &parts.console {
                    port.nudge();
                }
                Ok(())
            }
            _ => Err(ControlError::State { state: *state, action: ACTION }),
        }
    }

    /// Ends the VM at once, whatever the guest does.
    ///
    /// # Errors
    /// [`ControlError::State`] when it has ended already, or was never set up.
    pub fn shutdown(&self) -> Result<(), ControlError> {
        let parts = self.parts("be shut down")?;
        if parts.vcpu_set.has_ended() {
            return Err(ControlError::State { state: VmState::Stopped, action: "be shut down" });
        }
        parts.vcpu_set.end(Exit::Stopped);
        Ok(())
    }

    fn change(
        &self,
        decide: impl FnOnce(VmState) -> Result<Change, &'static str>,
    ) -> Result<(), ControlError> {
        let mut state = self.state();
        let refused = |action| ControlError::State { state: *state, action };
        let change = decide(*state).map_err(refused)?;
        // Whoever runs or is paused has its parts.
        let parts = self.parts.get().ok_or_else(|| refused("be steered"))?;
        match change {
            Change::Hold { .. } => parts.vcpu_set.hold(),
            Change::Run => {
                parts.virtio.iter().for_each(|device| wiring::lock(device).resume());
                parts.vcpu_set.run();
                // Last: until they run, the last vCPU to come out may still have it rest.
                parts.steering.rest(false);
                parts.disks.iter().for_each(Disk::retry);
            }
            Change::TakeOver { .. } | Change::Nothing => {}
        }
        *state = change.end(*state);
        Ok(())
    }

    fn parts(&self, action: &'static str) -> Result<&Parts, ControlError> {
        self.parts.get().ok_or_else(|| ControlError::State { state: self.state_seen(), action })
    }
}
