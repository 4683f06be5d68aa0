//! Guests, demand and one policy on one host, step by step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use api::units::Bytes;

use super::faults::Fault;
use super::guest::Guest;
use super::policies::{MemoryPolicy, PolicyInput, VmInput};
use super::score::{ReversalDetector, Score};
use super::trace::{Series, Trace};
use super::{Reports, STEP, Setup};

/// What happens before this is not scored, as every policy first has to get from the same start to where it
/// wants to be.
pub const WARM_UP: Duration = Duration::from_secs(120);

/// After so long a VM is started even if there is no room for it.
pub const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// The state of the world at one moment, for plots.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// When.
    pub now: Duration,
    /// For each running VM: index, what it demands, what it has.
    pub vms: Vec<(usize, Bytes, Bytes)>,
    /// What all may hold.
    pub held: Bytes,
}

struct SimulatedVm<'a> {
    series: &'a Series,
    guest: Option<Guest>,
    fault: Option<Fault>,
    reversals: ReversalDetector,
    over: bool,
    stalled: bool,
    /// When it last asked to be started.
    asked: Duration,
}

/// Runs `policy` over `trace`. `watch` sees the world once a second.
pub fn run(
    trace: &Trace,
    setup: &Setup,
    policy: &mut dyn MemoryPolicy,
    watch: &mut dyn FnMut(&Snapshot),
) -> Score {
    World::new(trace, setup).run(policy, watch, &AtomicBool::new(false))
}

/// The same; `None` where `stop` was set before its end.
pub fn run_until(
    trace: &Trace,
    setup: &Setup,
    policy: &mut dyn MemoryPolicy,
    watch: &mut dyn FnMut(&Snapshot),
    stop: &AtomicBool,
) -> Option<Score> {
    let score = World::new(trace, setup).run(policy, watch, stop);
    (!stop.load(Ordering::Relaxed)).then_some(score)
}

struct World<'a> {
    setup: &'a Setup,
    vms: Vec<SimulatedVm<'a>>,
    waiting: Vec<usize>,
    seconds: u64,
    score: Score,
}

impl<'a> World<'a> {
    fn new(trace: &'a Trace, setup: &'a Setup) -> Self {
        let budget = setup.host.budget();
        let at_once = trace.vms.iter().filter(|series| series.starts == 0);
        let sizes: Bytes = at_once.map(|series| series.limits.max()).sum();
        let vms = trace
            .vms
            .iter()
            .enumerate()
            .map(|(index, series)| {
                let fault = setup.faults.get(index).copied();
                // All policies begin with the same: the budget less a twentieth, by size.
                let share = u128::from(budget.0) * 95 / 100 * u128::from(series.limits.max().0)
                    / u128::from(sizes.0.max(1));
                let share = series.limits.clamp(Bytes(u64::try_from(share).unwrap_or(u64::MAX)));
                let guest = (series.starts == 0)
                    .then(|| Guest::running(series.limits, share, fault, index).growing_by(setup.grow));
                let reversals = ReversalDetector::default();
                SimulatedVm {
                    series,
                    guest,
                    fault,
                    reversals,
                    over: false,
                    stalled: false,
                    asked: Duration::ZERO,
                }
            })
            .collect();
        Self { setup, vms, waiting: Vec::new(), seconds: trace.seconds, score: Score::default() }
    }

    fn run(
        mut self,
        policy: &mut dyn MemoryPolicy,
        watch: &mut dyn FnMut(&Snapshot),
        stop: &AtomicBool,
    ) -> Score {
        let steps = Duration::from_secs(self.seconds).as_millis() / STEP.as_millis();
        let mut next = Duration::ZERO;
        let (mut seen, mut targets, mut snapshot) = (Vec::new(), Vec::new(), Snapshot::default());
        for step in 0..steps as u32 {
            let now = STEP * step;
            self.start_and_end(now);
            self.live(now, policy.is_refused_what_is_not_there());
            if now >= next {
                next = now + policy.cadence();
                if self.setup.reports == Reports::Asked {
                    self.ask(now);
                }
                self.decide(now, policy, &mut seen, &mut targets);
            }
            self.judge(now);
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if now.subsec_millis() == 0 {
                self.show(now, &mut snapshot);
                watch(&snapshot);
            }
        }
        self.score
    }

    fn held(&self) -> Bytes {
        self.vms.iter().filter_map(|vm| vm.guest.as_ref()).map(Guest::holds).sum()
    }

    fn promised(&self) -> Bytes {
        self.vms.iter().filter_map(|vm| vm.guest.as_ref()).map(|guest| guest.holds().max(guest.target)).sum()
    }

    fn reserved(&self) -> Bytes {
        self.waiting.iter().map(|&index| self.vms[index].series.limits.startup()).sum()
    }

    fn start_and_end(&mut self, now: Duration) {
        for (index, vm) in self.vms.iter_mut().enumerate() {
            let Series { starts, ends, .. } = *vm.series;
            if vm.guest.is_some() && ends.is_some_and(|end| now >= Duration::from_secs(end)) {
                vm.guest = None;
                vm.over = true;
            }
            let dead = vm.fault.is_some_and(|fault| fault.is_dead(now));
            if dead && vm.guest.take().is_some() {
                (vm.reversals, vm.stalled) = (ReversalDetector::default(), false);
            }
            let due = now == Duration::from_secs(starts) && starts > 0;
            let again = vm.fault == Some(Fault::Dying) && now >= Duration::from_secs(starts);
            let waits = self.waiting.contains(&index);
            if vm.guest.is_none() && !vm.over && !dead && !waits && (due || again) {
                vm.asked = now;
                self.waiting.push(index);
            }
        }
        while let Some(&index) = self.waiting.first() {
            let SimulatedVm { series: Series { limits, .. }, asked, .. } = self.vms[index];
            let room = self.setup.host.budget().saturating_sub(self.promised());
            let waited = now.saturating_sub(asked);
            if room < limits.startup() && waited < LONGEST_WAIT {
                self.score.waited += self.waiting.len() as u64;
                return;
            }
            let vm = &mut self.vms[index];
            vm.guest = Some(Guest::starting(*limits, limits.startup(), vm.fault, self.setup.grow, now));
            self.waiting.remove(0);
        }
    }

    fn live(&mut self, now: Duration, refused: bool) {
        let mut room = self.setup.host.budget().saturating_sub(self.held());
        for vm in &mut self.vms {
            let Some(guest) = &mut vm.guest else { continue };
            let demand = vm.series.at(now);
            vm.reversals.demand(guest.wants(now, demand));
            let room = refused.then_some(&mut room);
            let happened = guest.step(now, demand, vm.series.cache, &self.setup.speeds, room);
            guest.tell(now, vm.series.commit_percent, happened.stalled);
            vm.stalled = happened.stalled;
            if now < WARM_UP {
                continue;
            }
            if vm.fault.is_some() {
                self.score.faulty_stalled += u64::from(happened.stalled || happened.killed);
                continue;
            }
            self.score.steps += 1;
            self.score.stalled += u64::from(happened.stalled);
            self.score.killed += u64::from(happened.killed);
            self.score.churn += happened.moved;
        }
    }

    /// Has each guest tell of itself that has the time to.
    fn ask(&mut self, now: Duration) {
        for vm in self.vms.iter_mut().filter(|vm| !vm.stalled) {
            if let Some(guest) = &mut vm.guest {
                guest.answer(now, vm.series.commit_percent);
            }
        }
    }

    fn decide(
        &mut self,
        now: Duration,
        policy: &mut dyn MemoryPolicy,
        seen: &mut Vec<VmInput>,
        targets: &mut Vec<(usize, Bytes)>,
    ) {
        seen.clear();
        for (index, vm) in self.vms.iter().enumerate() {
            let Some(guest) = &vm.guest else { continue };
            seen.push(VmInput {
                id: index,
                limits: guest.limits,
                target: guest.target,
                actual: guest.has(),
                unmanaged: guest.unmanaged(),
                most: guest.most(),
                allowed: vm.fault.and_then(|fault| fault.allowed(&guest.limits)),
                resident: guest.resident,
                hidden: vm.fault == Some(Fault::Hidden),
                driver: guest.driver,
                answers: vm.fault.is_none_or(|fault| fault.answers(now)),
                uptime: now.saturating_sub(guest.started),
                report: guest.report,
            });
        }
        targets.clear();
        let budget = self.setup.host.budget();
        policy.decide(&PolicyInput { now, budget, reserved: self.reserved(), vms: seen }, targets);
        for &(index, target) in targets.iter() {
            let vm = &mut self.vms[index];
            let Some(guest) = &mut vm.guest else { continue };
            if vm.fault.is_some_and(|fault| !fault.answers(now)) {
                continue;
            }
            let target = guest.limits.clamp(target);
            if target == guest.target {
                continue;
            }
            // A guest is told to keep what it was asked for and has not given, or not to take what it was
            // granted and never had: nothing moves back.
            let called_back = (target > guest.target && target <= guest.has())
                || (target < guest.target && target >= guest.has());
            let wants = guest.wants(now, vm.series.at(now));
            let turned = !called_back && vm.reversals.moved(now, guest.target, target, wants);
            guest.target = target;
            if now >= WARM_UP && vm.fault.is_none() {
                self.score.decisions += 1;
                self.score.reversals += u64::from(turned);
            }
        }
    }

    fn judge(&mut self, now: Duration) {
        if now < WARM_UP {
            return;
        }
        let over = self.held().saturating_sub(self.setup.host.budget());
        self.score.over_budget += u64::from(over > Bytes::ZERO);
        self.score.worst_over = self.score.worst_over.max(over);
        let resident: Bytes =
            self.vms.iter().filter_map(|vm| vm.guest.as_ref()).map(|guest| guest.resident).sum();
        if resident > self.setup.host.total {
            // The host swaps: everyone waits. Those who waited anyway are counted already.
            self.score.host_full += 1;
            let more = self.vms.iter().filter(|vm| vm.guest.is_some() && !vm.stalled && vm.fault.is_none());
            self.score.stalled += more.count() as u64;
        }
    }

    fn show(&self, now: Duration, snapshot: &mut Snapshot) {
        snapshot.now = now;
        snapshot.held = self.held();
        snapshot.vms.clear();
        for (index, vm) in self.vms.iter().enumerate() {
            if let Some(guest) = &vm.guest {
                snapshot.vms.push((index, vm.series.at(now), guest.has()));
            }
        }
    }
}
