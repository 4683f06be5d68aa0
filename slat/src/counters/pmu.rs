//! Page walks by the processor's own counters (PMU), where it has them and the host lets them be read.
//!
//! Events have numbers of their own on each kind of processor. Those here are Intel's
//! `DTLB_{LOAD,STORE}_MISSES.WALK_ACTIVE` and `.WALK_COMPLETED` and `EPT.WALK_PENDING` (Intel's perfmon event
//! lists; up to Cascade Lake the first leave out the time in EPT, which the last adds), and AMD's
//! `ls_l1_d_tlb_miss.all_l2_miss` (processor programming references of families 17h to 1Ah), which counts walks:
//! AMD has no event for their cycles.

use std::io;
use std::time::Duration;

use perf_event::events::{self, Raw};
use perf_event::{Builder, Counter, ReadFormat};

use crate::host::cpuinfo;

/// An event with its unit mask and counter mask, as `PERF_TYPE_RAW` takes them (Linux: x86's `format` files).
const fn raw(event: u64, unit: u64, cycles: u64) -> u64 {
    event | unit << 8 | cycles << 24
}

/// The events of one kind of processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Events {
    /// Their sum is the cycles in which a walk was under way.
    cycles: &'static [u64],
    /// Their sum is the walks.
    walks: &'static [u64],
}

const SKYLAKE: Events = Events {
    cycles: &[raw(0x08, 0x10, 1), raw(0x49, 0x10, 1), raw(0x4f, 0x10, 0)],
    walks: &[raw(0x08, 0x0e, 0), raw(0x49, 0x0e, 0)],
};
const ICE_LAKE: Events = Events {
    cycles: &[raw(0x08, 0x10, 1), raw(0x49, 0x10, 1)],
    walks: &[raw(0x08, 0x0e, 0), raw(0x49, 0x0e, 0)],
};
const SAPPHIRE_RAPIDS: Events = Events {
    cycles: &[raw(0x12, 0x10, 1), raw(0x13, 0x10, 1)],
    walks: &[raw(0x12, 0x0e, 0), raw(0x13, 0x0e, 0)],
};
const ZEN: Events = Events { cycles: &[], walks: &[raw(0x45, 0xf0, 0)] };

/// The events of a processor, by the names and numbers of /proc/cpuinfo. Those with two kinds of cores, whose
/// events differ, are left out.
fn known(vendor: &str, family: u32, model: u32) -> Option<Events> {
    match (vendor, family, model) {
        ("GenuineIntel", 6, 0x4e | 0x5e | 0x55 | 0x8e | 0x9e | 0xa5 | 0xa6) => Some(SKYLAKE),
        ("GenuineIntel", 6, 0x6a | 0x6c | 0x7d | 0x7e | 0x8c | 0x8d | 0xa7) => Some(ICE_LAKE),
        ("GenuineIntel", 6, 0x8f | 0xcf | 0xad | 0xae) => Some(SAPPHIRE_RAPIDS),
        ("AuthenticAMD", 0x17 | 0x19 | 0x1a, _) => Some(ZEN),
        _ => None,
    }
}

/// Walks of one measured round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walks {
    /// Cycles in which one was under way; `None` where the processor has no such event.
    pub cycles: Option<u64>,
    /// How many.
    pub count: Option<u64>,
}

impl Walks {
    /// Those of two threads together; what one lacks the sum lacks too.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let sum = |a: Option<u64>, b: Option<u64>| Some(a?.saturating_add(b?));
        Self { cycles: sum(self.cycles, other.cycles), count: sum(self.count, other.count) }
    }
}

/// Counters of the thread that made it.
#[derive(Debug)]
pub struct Pmu {
    cycles: Vec<Event>,
    walks: Vec<Event>,
}

/// One event, and its times when the round began: a reset zeroes the count and leaves those
/// (perf_event_open(2), `PERF_EVENT_IOC_RESET`).
#[derive(Debug)]
struct Event {
    counter: Counter,
    before: Times,
}

/// How long an event was wanted, and how long it was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Times {
    enabled: Duration,
    running: Duration,
}

impl Times {
    /// What an event would have counted with a counter of its own: where more are wanted than there are
    /// counters, they take turns. `None` where it had no turn since `before`.
    fn scale(self, count: u64, before: Self) -> Option<u64> {
        let enabled = self.enabled.checked_sub(before.enabled)?.as_nanos();
        let running = self.running.checked_sub(before.running)?.as_nanos();
        u64::try_from(u128::from(count).checked_mul(enabled)?.checked_div(running)?).ok()
    }
}

impl Event {
    fn read(&mut self) -> Option<(u64, Times)> {
        let data = self.counter.read_full().ok()?;
        Some((data.count(), Times { enabled: data.time_enabled()?, running: data.time_running()? }))
    }

    /// One that does not count has no turn, which reading it finds.
    fn start(&mut self) {
        let _ = self.counter.reset();
        self.before = self.read().map(|(_, times)| times).unwrap_or_default();
        let _ = self.counter.enable();
    }

    fn counted(&mut self) -> Option<u64> {
        let (count, now) = self.read()?;
        now.scale(count, self.before)
    }
}

/// Whose work counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// A guest's alone.
    Guest,
    /// This process's own.
    Own,
}

fn counter(event: impl events::Event + Copy, whose: Whose) -> io::Result<Event> {
    let open = |kernel: bool| {
        let mut builder = Builder::new(event);
        builder.read_format(ReadFormat::TOTAL_TIME_ENABLED | ReadFormat::TOTAL_TIME_RUNNING);
        builder.exclude_host(whose == Whose::Guest).exclude_kernel(!kernel).build()
    };
    // Without privileges only ring 3 may be counted (kernel.perf_event_paranoid).
    let counter = match open(whose == Whose::Guest) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => open(false)?,
        result => result?,
    };
    Ok(Event { counter, before: Times::default() })
}

/// All of them together; `None` where there are none, or where one had no turn on the processor.
fn sum(events: &mut [Event]) -> Option<u64> {
    if events.is_empty() {
        return None;
    }
    events.iter_mut().try_fold(0_u64, |sum, event| sum.checked_add(event.counted()?))
}

impl Pmu {
    /// Opens this thread's counters.
    ///
    /// # Errors
    /// A sentence that says why there are none.
    pub fn of_this_thread(whose: Whose) -> Result<Self, String> {
        let field = |name| cpuinfo(name).unwrap_or_default();
        let number = |name| field(name).parse().unwrap_or(0);
        let (vendor, family, model) = (field("vendor_id"), number("cpu family"), number("model"));
        let known = known(&vendor, family, model).ok_or_else(|| {
            format!("it is not known how {vendor} family {family} model {model} counts page walks")
        })?;
        let open = |configs: &[u64]| -> Result<Vec<Event>, String> {
            configs
                .iter()
                .map(|config| counter(Raw::new(*config), whose))
                .collect::<io::Result<_>>()
                .map_err(why)
        };
        Ok(Self { cycles: open(known.cycles)?, walks: open(known.walks)? })
    }

    /// From zero.
    pub fn start(&mut self) {
        self.cycles.iter_mut().chain(&mut self.walks).for_each(Event::start);
    }

    /// What was counted since the start.
    pub fn stop(&mut self) -> Walks {
        for event in self.cycles.iter_mut().chain(&mut self.walks) {
            let _ = event.counter.disable();
        }
        Walks { cycles: sum(&mut self.cycles), count: sum(&mut self.walks) }
    }
}

fn why(error: io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP) => {
            "the host shows no performance counters (under a hypervisor: it keeps them for itself)".into()
        }
        Some(libc::EACCES | libc::EPERM) => {
            "no permission for performance counters: it takes root, CAP_PERFMON, or kernel.perf_event_paranoid \
             of 2 or less"
                .into()
        }
        _ => format!("performance counters can't be opened: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use perf_event::events::Software;

    #[test]
    fn events_are_those_of_the_processor() {
        assert_eq!(known("GenuineIntel", 6, 0x55), Some(SKYLAKE));
        assert_eq!(SKYLAKE.cycles.first(), Some(&0x0100_1008));
        assert_eq!(known("GenuineIntel", 6, 0x8f), Some(SAPPHIRE_RAPIDS));
        assert_eq!(known("AuthenticAMD", 0x19, 1).map(|e| e.walks), Some(&[0xf045][..]));
        assert_eq!(known("GenuineIntel", 6, 0x97), None, "its cores are of two kinds");
        assert_eq!(known("", 0, 0), None);
    }

    #[test]
    fn this_host_counts_walks_or_says_why_not() {
        match Pmu::of_this_thread(Whose::Own) {
            Ok(mut pmu) => {
                pmu.start();
                println!("{:?}", pmu.stop());
            }
            Err(why) => {
                println!("{why}");
                assert!(!why.is_empty());
            }
        }
    }

    #[test]
    fn a_counter_that_every_kernel_has_counts() {
        // Page faults are counted by the kernel itself: the same way in, and no PMU needed.
        let faults = match counter(Software::PAGE_FAULTS, Whose::Own) {
            Ok(event) => event,
            Err(error) => return println!("not run: {}", why(error)),
        };
        let mut pmu = Pmu { cycles: vec![], walks: vec![faults] };
        pmu.start();
        let mapping = crate::payload::memory::Mapping::new(
            api::units::Bytes::mib(2),
            crate::payload::memory::Backing::Small,
        );
        let mapping = mapping.expect("memory");
        for page in 0..16 {
            // SAFETY: within the mapping, which nobody else knows.
            unsafe { mapping.start().add(page * 4096).write_volatile(1) };
        }
        let walks = pmu.stop();
        assert_eq!(walks.cycles, None);
        assert!(walks.count.is_some_and(|n| n >= 16), "{walks:?}");
        // A second round in which it gets no turn: nothing was counted, which is not the same as none.
        let event = &mut pmu.walks[0];
        event.start();
        let _ = event.counter.disable();
        event.before = event.read().expect("readable").1;
        assert_eq!(sum(&mut pmu.walks), None);
    }

    #[test]
    fn an_event_without_a_turn_in_this_round_has_no_count() {
        let times = |enabled, running| Times {
            enabled: Duration::from_millis(enabled),
            running: Duration::from_millis(running),
        };
        assert_eq!(times(10, 5).scale(7, Times::default()), Some(14));
        assert_eq!(times(30, 10).scale(7, times(10, 5)), Some(28), "of this round's times alone");
        assert_eq!(times(30, 5).scale(0, times(10, 5)), None);
    }

    #[test]
    fn walks_are_added_where_both_have_them() {
        let one = Walks { cycles: Some(5), count: Some(1) };
        assert_eq!(one.and(Walks { cycles: None, count: Some(2) }), Walks { cycles: None, count: Some(3) });
    }
}
