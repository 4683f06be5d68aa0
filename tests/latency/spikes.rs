//! Spikes, in the emulated host: each guest in turn takes more than it has.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;
use api::units::Bytes;
use guests::{Daemon, Printed, Vm, VmSettings, wait_looking_every};
use lab::Kernel;

use crate::Mode;
use crate::clock::{self, Offset};
use crate::figures::{Sample, Seen};

/// Those that take memory.
pub const GUESTS: [&str; 4] = ["a", "b", "c", "d"];
/// What each guest has before its spike: little more than the 70 MiB or so that it uses, so that it is short
/// soon after a spike has begun and not only after the balancer has looked at it.
const STARTUP: Bytes = Bytes::mib(128);
const LIMITS: &str = "128M,min=96M,max=448M";
/// There is memory for one spike at a time.
const BUDGET: &str = "960M";
/// Over three seconds, and mostly over half a one, the balancer was seen to grant before anyone had to wait.
const SPIKE: &str = "spike:200M:100ms";
/// A guest that waits is granted something within so many rounds of the daemon, or never: the first may have
/// begun before the wait.
const ENOUGH_ROUNDS: u64 = 3;
/// How often it is looked whether a guest has its memory. Each look costs the processor that all share about 1 ms.
const LOOK: Duration = Duration::from_millis(10);
/// Waits give up after ten times this.
const USUALLY: Duration = Duration::from_secs(60);

/// Measures these spikes, and says each as it is over.
///
/// # Errors
/// A guest or the daemon doesn't do what it is told.
pub fn measure(mode: Mode, spikes: Range<u32>) -> Result<()> {
    let images = Kernel::V6_1.guest_images()?;
    // One after the other: four that boot at once on one processor take four times as long each.
    let mut vms: Vec<Vm> = GUESTS
        .iter()
        .map(|name| {
            let settings = VmSettings::new(name, &images, LIMITS, "ballast.console");
            let settings = if mode == Mode::Called { settings.agent(&images) } else { settings };
            let mut vm = settings.start();
            vm.wait_until_ready();
            vm
        })
        .collect();
    let mut before = 0;
    for number in spikes {
        settle(&vms);
        // Each at another moment between two rounds of the daemon.
        let phase = Duration::from_millis(u64::from(number) * 370 % 1000);
        let which = number as usize % vms.len();
        let sample = spike(&mut vms[which], phase)?;
        let kills = vms.iter_mut().map(oom_kills).sum();
        Sample { oom_kills: kills - before, ..sample }.say(mode.name());
        before = kills;
    }
    Ok(())
}

/// Processes that a guest has killed since its boot.
fn oom_kills(vm: &mut Vm) -> u64 {
    vm.type_in("kills\n");
    let line = vm.wait_for_line("KILLS count=", USUALLY);
    vm.wait_for_line("DONE kills", USUALLY);
    clock::number(&line, "count=").expect("the guest counts what was killed")
}

/// Every guest has its startup memory again. No daemon runs, so that the next one knows nothing. A guest that
/// got no time of a busy machine seems to have no memory to give, and is asked again.
fn settle(vms: &[Vm]) {
    for vm in vms {
        vm.set_target(STARTUP);
    }
    for vm in vms {
        vm.wait_for_memory("the guest to settle", USUALLY, |memory| {
            if memory.settled && memory.actual > STARTUP {
                vm.set_target(STARTUP);
            }
            memory.actual <= STARTUP
        });
    }
}

fn spike(vm: &mut Vm, phase: Duration) -> Result<Sample> {
    let offset = Offset::measure(vm, USUALLY)?;
    let daemon = Daemon::with(Printed::No, &["--budget", BUDGET]);
    daemon.wait_for_rounds(2, GUESTS.len(), USUALLY);
    std::thread::sleep(phase);
    let before = vm.memory().actual;
    let typed = Instant::now();
    vm.type_in(&format!("{SPIKE}\n"));
    let (called, has) = watch(vm, &daemon, typed, before);
    let line = vm.wait_for_line("SPIKE onset_us=", USUALLY);
    vm.wait_for_line("DONE spike", USUALLY);
    let onset = offset.host_time(clock::number(&line, "onset_us="));
    let grants = daemon.grants(vm.name(), typed);
    vm.step("release", USUALLY);
    let waited = Duration::from_micros(clock::number(&line, "waited_us=").unwrap_or(0));
    let called = called.filter(|called| onset.is_some_and(|onset| *called + offset.doubt() >= onset));
    let seen = Seen { onset, grants, called, has };
    Ok(Sample { answer: seen.answer(), waited, doubt: offset.doubt(), oom_kills: 0 })
}

/// Looks on until the spike is over, and long enough after it for the daemon to have seen it: when the VM heard
/// its guest's call, as of the first grant, and when the guest had half of that grant.
fn watch(vm: &Vm, daemon: &Daemon, typed: Instant, before: Bytes) -> (Option<Instant>, Option<Instant>) {
    let (mut called, mut enough, mut has, mut last_round) = (None, None, None, None);
    wait_looking_every(LOOK, "the end of a spike", USUALLY, || {
        if enough.is_none() && !daemon.grants(vm.name(), typed).is_empty() {
            let memory = vm.memory();
            let age = memory.agent.and_then(|agent| agent.distress_age_ms);
            called = age.and_then(|age| Instant::now().checked_sub(Duration::from_millis(age)));
            enough = Some(before + Bytes(memory.target.saturating_sub(before).0 / 2));
        }
        if has.is_none() && enough.is_some_and(|enough| vm.memory().actual >= enough) {
            has = Some(Instant::now());
        }
        let line = vm.line("SPIKE onset_us=")?;
        vm.line("DONE spike")?;
        if enough.is_some() {
            return has.map(drop);
        }
        // Nobody waited, so nobody need be granted anything.
        if clock::number(&line, "onset_us=").is_none() {
            return Some(());
        }
        let rounds = daemon.state()?.rounds;
        let last = *last_round.get_or_insert(rounds.saturating_add(ENOUGH_ROUNDS));
        (rounds >= last).then_some(())
    });
    (called, has)
}
