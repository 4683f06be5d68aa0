//! How a VM lives with the memory it has.
//!
//! A guest touches what its programs demand, as far as it has memory. The rest goes to swap at the speed of
//! swap, and the guest stalls meanwhile. When swap is full, programs are killed. Free memory fills with page
//! cache slowly and is given back at once. A balloon takes free memory first, then cache, and then what
//! programs use, which must be swapped out.

use std::time::Duration;

use api::limits::Limits;
use api::units::Bytes;

use super::faults::Fault;
use super::{Grow, STEP, Speeds};

/// Swap space of each guest.
pub const SWAP: Bytes = Bytes::gib(1);

/// How long a guest takes from its start until its balloon driver runs.
pub const BOOT: Duration = Duration::from_secs(8);

/// How much more a guest uses each second after its boot, at most: its programs load.
pub const LOADING: Bytes = Bytes::mib(64);

/// How often a guest reports by its own clock, and how late while it stalls.
pub const REPORT: Duration = Duration::from_secs(1);

/// See [`REPORT`].
pub const REPORT_STALLED: Duration = Duration::from_secs(2);

/// A guest's report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub taken: Duration,
    /// What it had then (`MemTotal`).
    pub total: Bytes,
    /// What could be had without swapping (`MemAvailable`).
    pub available: Bytes,
    /// What was unused (`MemFree`).
    pub free: Bytes,
    /// What it had promised its programs (`Committed_AS`).
    pub committed: Bytes,
    /// How often its programs had to wait for memory so far (`allocstall`).
    pub stalls: u64,
}

/// One running VM.
#[derive(Clone, Debug)]
pub struct Guest {
    pub limits: Limits,
    /// What its balloon was last asked to leave it.
    pub target: Bytes,
    /// What it was given: what its balloon leaves it, whether its kernel manages that or not.
    pub actual: Bytes,
    /// What the host holds for it.
    pub resident: Bytes,
    /// When it was started.
    pub started: Duration,
    pub report: Option<Report>,
    /// Whether its balloon driver runs.
    pub driver: bool,
    /// What is wrong with it.
    pub fault: Option<Fault>,
    pub grow: Grow,
    used: Bytes,
    swapped: Bytes,
    cache: Bytes,
    stalls: u64,
    reports_at: Duration,
    settled: bool,
}

/// What happened to a guest in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepOutcome {
    /// It waited for memory.
    pub stalled: bool,
    /// A program was killed for lack of memory.
    pub killed: bool,
    /// How far `actual` moved, either way.
    pub moved: Bytes,
}

/// What the guest's kernel keeps free: allocations below it wait.
pub fn watermark(actual: Bytes) -> Bytes {
    Bytes::mib(8).max(Bytes(actual.0 / 128))
}

fn in_a_step(speed: Bytes) -> Bytes {
    Bytes(speed.0 * STEP.as_millis() as u64 / 1000)
}

impl Guest {
    /// A guest that has run for long and has `actual`.
    pub fn running(limits: Limits, actual: Bytes, fault: Option<Fault>, index: usize) -> Self {
        let driver = fault != Some(Fault::Driverless);
        let actual = if driver { actual } else { limits.max() };
        let actual = fault.map_or(actual, |fault| {
            let allowed = fault.allowed(&limits).unwrap_or(limits.max());
            actual.min(allowed).min(fault.most(&limits)).saturating_add(fault.unmanaged(&limits, Bytes::ZERO))
        });
        Self {
            driver,
            settled: driver,
            // Guests' timers don't run in step.
            reports_at: STEP * (index % 4) as u32,
            ..Self::starting(limits, actual, fault, Grow::Balloon, Duration::ZERO)
        }
    }

    /// The same guest, growing by other means.
    pub fn growing_by(self, grow: Grow) -> Self {
        Self { grow, ..self }
    }

    /// A guest that starts `now`. It has all of its memory map until its driver takes some, or its startup
    /// memory if it grows by plugging.
    pub fn starting(limits: Limits, target: Bytes, fault: Option<Fault>, grow: Grow, now: Duration) -> Self {
        let actual = if now == Duration::ZERO || grow == Grow::Plug { target } else { limits.max() };
        Self {
            limits,
            target,
            actual,
            resident: Bytes::ZERO,
            started: now,
            report: None,
            driver: false,
            fault,
            grow,
            used: Bytes::ZERO,
            swapped: Bytes::ZERO,
            cache: Bytes::ZERO,
            stalls: 0,
            reports_at: now + BOOT,
            settled: false,
        }
    }

    /// What its kernel does not manage of what it was given.
    pub fn unmanaged(&self) -> Bytes {
        self.fault.map_or(Bytes::ZERO, |fault| fault.unmanaged(&self.limits, self.actual))
    }

    /// What it has: what it was given and its kernel manages.
    pub fn has(&self) -> Bytes {
        self.actual.saturating_sub(self.unmanaged())
    }

    /// The most that it can have.
    pub fn most(&self) -> Bytes {
        self.fault.map_or(self.limits.max(), |fault| fault.most(&self.limits))
    }

    /// What it is to be given for its target. Memory that is plugged for it makes up for no other.
    fn goal(&self) -> Bytes {
        let beside = self.fault.map_or(Bytes::ZERO, |fault| fault.unmanaged(&self.limits, Bytes::ZERO));
        self.target.saturating_add(beside).min(self.limits.max())
    }

    /// What it may hold without asking, which the host must have for it. What its kernel does not manage it
    /// never touches.
    ///
    /// Until its balloon has reached the first target, that is what it has touched.
    pub fn holds(&self) -> Bytes {
        match (self.driver, self.settled) {
            (false, _) if self.fault == Some(Fault::Driverless) => self.limits.max(),
            (_, false) => self.resident,
            _ => self.has().max(self.resident),
        }
    }

    /// One step. `room` is what the host would give it now; `None` is no limit.
    pub fn step(
        &mut self,
        now: Duration,
        demand: Bytes,
        cache: Bytes,
        speeds: &Speeds,
        room: Option<&mut Bytes>,
    ) -> StepOutcome {
        if !self.driver && self.fault != Some(Fault::Driverless) && now >= self.started + BOOT {
            self.driver = true;
        }
        let before = self.actual;
        if self.driver {
            self.balloon(now, speeds, room);
            self.settled |= self.actual <= self.goal();
        }
        let demand = self.wants(now, demand);
        let (stalled, mut killed) = self.live(demand, cache, speeds);
        let allowed = self.fault.and_then(|fault| fault.allowed(&self.limits));
        killed |= allowed.is_some_and(|allowed| self.resident > allowed);
        let moved = if self.settled { Bytes(before.0.abs_diff(self.actual.0)) } else { Bytes::ZERO };
        StepOutcome { stalled, killed, moved }
    }

    /// What of `demand` it wants so soon after its start.
    pub fn wants(&self, now: Duration, demand: Bytes) -> Bytes {
        // Nobody gives a VM more work than it could ever do.
        let confined = self.fault.and_then(|fault| fault.confines(&self.limits));
        let fits = confined.map_or(Bytes(u64::MAX), |most| most.saturating_sub(watermark(most)).percent(95));
        demand.min(fits).min(self.grown_up(now))
    }

    /// What it can use so soon after its start: programs load one after the other.
    fn grown_up(&self, now: Duration) -> Bytes {
        if self.started == Duration::ZERO {
            return self.limits.max();
        }
        let since = now.saturating_sub(self.started + BOOT).as_secs();
        Bytes(self.limits.startup().0 / 2).saturating_add(Bytes(LOADING.0 * since))
    }

    /// Takes its statistics if it is time.
    pub fn tell(&mut self, now: Duration, commit_percent: u64, stalled: bool) {
        if now >= self.reports_at {
            self.report(now, commit_percent, stalled);
        }
    }

    /// Takes its statistics on request, which it can unless it waits for memory.
    pub fn answer(&mut self, now: Duration, commit_percent: u64) {
        self.report(now, commit_percent, false);
    }

    fn report(&mut self, now: Duration, commit_percent: u64, stalled: bool) {
        if !self.driver || self.fault.is_some_and(|fault| !fault.reports(now)) {
            return;
        }
        self.reports_at = now + if stalled { REPORT_STALLED } else { REPORT };
        let free = self.has().saturating_sub(self.used).saturating_sub(self.cache);
        let keeps = watermark(self.has());
        // As the kernel's si_mem_available(): half of the cache, or the watermark, is not counted.
        let cache = self.cache.saturating_sub(Bytes(self.cache.0 / 2).min(keeps));
        let available = free.saturating_sub(keeps).saturating_add(cache);
        let promised = self.used.saturating_add(self.swapped).percent(commit_percent);
        let lies = self.fault == Some(Fault::Lying);
        self.report = Some(Report {
            taken: now,
            total: self.has(),
            available: if lies { Bytes::ZERO } else { available },
            free: if lies { Bytes::ZERO } else { free },
            committed: if lies { Bytes(promised.0 * 10) } else { promised },
            stalls: if lies { now.as_secs() } else { self.stalls },
        });
    }

    fn balloon(&mut self, now: Duration, speeds: &Speeds, room: Option<&mut Bytes>) {
        let (up, down) = self.grow.speeds(speeds, &self.limits, self.actual);
        let goal = self.goal();
        if goal > self.actual {
            let mut up = in_a_step(up).min(goal - self.actual);
            if let Some(room) = room {
                up = up.min(*room);
                *room = room.saturating_sub(up);
            }
            self.actual += up;
            return;
        }
        if self.fault.is_some_and(|fault| !fault.inflates(now)) {
            return;
        }
        let wanted = in_a_step(down).min(self.actual.saturating_sub(goal));
        let free = self
            .has()
            .saturating_sub(watermark(self.has()))
            .saturating_add(if self.fault == Some(Fault::OffLine) { self.unmanaged() } else { Bytes::ZERO })
            .saturating_sub(self.used)
            .saturating_sub(self.cache);
        let from_free = wanted.min(free);
        let from_cache = (wanted - from_free).min(self.cache).min(in_a_step(speeds.reclaim));
        self.cache -= from_cache;
        let mut down = from_free + from_cache;
        if self.cache == Bytes::ZERO {
            // The rest is in use: it goes at the speed of swap, until swap is full.
            let space = SWAP.saturating_sub(self.swapped);
            down += (wanted - down).min(in_a_step(speeds.swap)).min(space);
        }
        self.actual -= down;
        // What the balloon takes was its kernel's.
        self.resident = self.resident.min(self.has());
    }

    fn live(&mut self, demand: Bytes, cache: Bytes, speeds: &Speeds) -> (bool, bool) {
        let capacity = self.has().saturating_sub(watermark(self.has()));
        let short = demand.saturating_sub(capacity);
        let stalled = short > Bytes::ZERO;
        self.stalls += u64::from(stalled);
        let swap = in_a_step(speeds.swap);
        self.used = demand.min(capacity);
        self.swapped = if short > self.swapped {
            short.min(self.swapped.saturating_add(swap)).min(SWAP)
        } else {
            short.max(self.swapped.saturating_sub(swap))
        };
        let killed = short > SWAP && self.swapped == SWAP;
        let room = capacity.saturating_sub(self.used);
        self.cache = cache.min(self.cache.saturating_add(in_a_step(speeds.read))).min(room);
        self.resident = self.resident.max(self.used.saturating_add(self.cache)).min(self.has());
        (stalled, killed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        "2G,min=512M,max=4G".parse().unwrap()
    }

    fn run(guest: &mut Guest, from: u64, seconds: u64, demand: Bytes) -> (u64, u64) {
        let (mut stalled, mut killed) = (0, 0);
        for step in from * 4..(from + seconds) * 4 {
            let now = STEP * step as u32;
            let happened = guest.step(now, demand, Bytes::gib(1), &Speeds::default(), None);
            guest.tell(now, 120, happened.stalled);
            stalled += u64::from(happened.stalled);
            killed += u64::from(happened.killed);
            assert!(guest.used + guest.cache <= guest.actual, "memory appears from nowhere");
            assert!(guest.resident <= guest.has());
            assert!(guest.actual <= guest.limits.max());
        }
        (stalled, killed)
    }

    #[test]
    fn what_a_balloon_takes_is_given_back_whatever_the_kernel_does_not_manage() {
        for fault in [None, Some(Fault::Mem), Some(Fault::Crashkernel)] {
            let mut guest = Guest::running(limits(), Bytes::gib(2), fault, 0);
            guest.target = guest.most();
            run(&mut guest, 10, 60, Bytes::mib(1500));
            assert!(guest.resident > Bytes::mib(1500), "{fault:?}: {}", guest.resident);
            guest.target = Bytes::gib(1);
            run(&mut guest, 70, 120, Bytes::mib(700));
            assert!(guest.resident <= Bytes::gib(1), "{fault:?}: {}", guest.resident);
        }
    }

    #[test]
    fn enough_is_no_stall_and_cache_counts_as_available() {
        let mut guest = Guest::running(limits(), Bytes::gib(2), None, 0);
        assert_eq!(run(&mut guest, 0, 60, Bytes::gib(1)), (0, 0));
        let report = guest.report.unwrap();
        assert!(report.free < Bytes::mib(100), "cache fills free memory: {}", report.free);
        assert!(report.available > Bytes::mib(900), "and can be had back: {}", report.available);
        assert_eq!(report.committed, Bytes::gib(1).percent(120));
    }

    #[test]
    fn too_little_stalls_and_much_too_little_kills_when_swap_is_full() {
        let mut guest = Guest::running(limits(), Bytes::gib(2), None, 0);
        assert_eq!(run(&mut guest, 0, 60, Bytes::gib(2) + Bytes::mib(200)), (240, 0));
        let (stalled, killed) = run(&mut guest, 60, 60, Bytes::gib(3) + Bytes::mib(500));
        assert_eq!(stalled, 240);
        assert!((100..240).contains(&killed), "swap fills first: {killed}");
    }

    #[test]
    fn a_balloon_takes_free_memory_fast_and_used_memory_as_slowly_as_swap() {
        let mut guest = Guest::running(limits(), Bytes::gib(4), None, 0);
        run(&mut guest, 0, 60, Bytes::gib(1));
        guest.target = Bytes::gib(2);
        let (stalled, _) = run(&mut guest, 60, 8, Bytes::gib(1));
        assert_eq!((guest.actual, stalled), (Bytes::gib(2), 0));
        guest.target = Bytes::mib(512);
        let (stalled, _) = run(&mut guest, 68, 4, Bytes::gib(1));
        assert!(stalled > 0 && guest.actual > Bytes::mib(512));
    }

    #[test]
    fn each_fault_is_seen() {
        let moved = |fault| {
            let mut guest = Guest::running(limits(), Bytes::gib(4), Some(fault), 0);
            guest.target = Bytes::gib(2);
            run(&mut guest, 30, 20, Bytes::gib(1));
            let early = guest.actual;
            run(&mut guest, 360, 20, Bytes::gib(1));
            (early, guest)
        };
        assert_eq!(moved(Fault::Stuck).1.actual, Bytes::gib(4));
        let (early, guest) = moved(Fault::Intermittent);
        assert_eq!((early, guest.actual), (Bytes::gib(4), Bytes::gib(2)));
        assert_eq!(moved(Fault::Lying).1.report.unwrap().available, Bytes::ZERO);
        assert!(moved(Fault::Silent).1.report.unwrap().taken < Duration::from_secs(60));
        let guest = moved(Fault::Driverless).1;
        assert_eq!((guest.driver, guest.actual, guest.report), (false, Bytes::gib(4), None));
        assert!(!Fault::Unresponsive.answers(Duration::from_secs(301)));
    }

    #[test]
    fn a_start_has_its_whole_map_until_the_driver_runs_and_is_charged_what_it_touched() {
        let now = Duration::from_secs(100);
        let mut guest = Guest::starting(limits(), Bytes::gib(2), None, Grow::Balloon, now);
        run(&mut guest, 100, 4, Bytes::gib(1));
        assert_eq!(guest.actual, Bytes::gib(4));
        assert!(guest.holds() < Bytes::mib(1200));
        run(&mut guest, 104, 20, Bytes::gib(1));
        assert_eq!(guest.holds(), Bytes::gib(2));
    }

    #[test]
    fn a_guest_that_plugs_has_no_more_than_it_was_given_and_moves_at_its_own_speeds() {
        let now = Duration::from_secs(100);
        let mut guest = Guest::starting(limits(), Bytes::gib(2), None, Grow::Plug, now);
        run(&mut guest, 100, 4, Bytes::gib(1));
        assert_eq!(guest.actual, Bytes::gib(2), "its map is not there yet");
        run(&mut guest, 104, 20, Bytes::gib(1));
        let speeds = Speeds::default();
        let seconds = |guest: &mut Guest, target| {
            guest.target = target;
            (1..100).find(|step| {
                guest.step(now * 2 + STEP * *step, Bytes::gib(1), Bytes::ZERO, &speeds, None);
                guest.actual == target
            })
        };
        let mut other = Guest { grow: Grow::Balloon, ..guest.clone() };
        for target in [Bytes::gib(4), Bytes::gib(2)] {
            let (plugs, inflates) = (seconds(&mut guest, target), seconds(&mut other, target));
            assert!(plugs.is_some() && plugs < inflates, "{target}: {plugs:?} {inflates:?}");
        }
        assert_eq!(
            seconds(&mut guest, Bytes::gib(2) - Bytes::mib(512)),
            seconds(&mut other, Bytes::gib(2) - Bytes::mib(512)),
            "below what it started with a balloon takes it"
        );
    }
}
