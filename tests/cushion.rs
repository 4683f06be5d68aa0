//! Stock guests without an agent that fill memory faster than a round comes: the cushion that is plugged for them
//! tells the balancer, and holds until more is plugged.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use api::agent::EventKind;
use api::client::{Client, EventSource};
use api::runtime;
use api::status::MemoryStatus;
use api::units::Bytes;
use guests::{Daemon, Host, Of, Printed, Vm, VmSettings, block_on, images, sum};
use lab::Kernel;

/// How long a step takes, with what the emulated host does for the other guests.
const MOVING: Duration = Duration::from_secs(40);
/// A small service, which may grow.
const SMALL: &str = "112M,min=88M,max=384M";
/// What it fills at a time, in MiB, at [`RATE`].
const LEAST: u64 = 40;
const MOST: u64 = 200;
/// MiB a second.
const RATE: u64 = 66;
/// What each guest keeps through all of it.
const KEPT: &str = "keep:8M:7";

fn guest(name: &str, kernel: Kernel) -> Vm {
    VmSettings::new(name, &images(kernel), SMALL, "ballast.console").with(&["--grow", "auto"]).start()
}

/// Numbers that look random and are the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn cushion(memory: &MemoryStatus) -> Bytes {
    memory.cushion.map_or(Bytes::ZERO, |cushion| cushion.size)
}

/// The guests together may have more than `budget` by what they took of their cushions, and no more.
fn check_budget(vms: &[Vm], budget: Bytes) {
    let all: Vec<MemoryStatus> = vms.iter().map(Vm::memory).collect();
    let held: Bytes = all.iter().filter_map(|memory| memory.host_rss).sum();
    let cushions: Bytes = all.iter().map(cushion).sum();
    assert!(held <= budget + cushions, "{held} of {budget}, with cushions of {cushions}: {all:#?}");
}

/// Has each guest in turn fill memory and give it back, `steps` times in all.
fn fill(vms: &mut [Vm], budget: Bytes, steps: u32, most_at_once: usize, random: &mut Random) {
    let mut full: Vec<usize> = Vec::new();
    for _ in 0..steps {
        let index = random.below(vms.len() as u64) as usize;
        if let Some(at) = full.iter().position(|other| *other == index) {
            full.remove(at);
            vms[index].step("release", MOVING);
            continue;
        }
        if full.len() == most_at_once {
            let first = full.remove(0);
            vms[first].step("release", MOVING);
        }
        let size = LEAST + random.below(MOST - LEAST);
        let began = Instant::now();
        vms[index].step(&format!("grow:{size}M:{}ms", size * 1000 / RATE), MOVING);
        full.push(index);
        let memory = vms[index].memory();
        println!(
            "{}: {size} MiB in {:?}: target {}, actual {}, {:?}",
            vms[index].name(),
            began.elapsed(),
            memory.target,
            memory.actual,
            memory.oom_deflate
        );
        check_budget(vms, budget);
    }
    for index in full {
        vms[index].step("release", MOVING);
    }
}

/// No process was killed, and what was kept is what it was.
fn finish(mut vms: Vec<Vm>) {
    for vm in &mut vms {
        vm.step("check", MOVING);
        vm.type_in("end\n");
        vm.wait_for_line("SUMMARY oom_kills=0", MOVING);
        assert_eq!(vm.wait_for_end(MOVING), 0);
    }
}

fn start(names: &[&str]) -> Vec<Vm> {
    let mut vms: Vec<Vm> = names
        .iter()
        .zip([Kernel::V6_1, Kernel::V6_12].into_iter().cycle())
        .map(|(name, kernel)| {
            let mut vm = guest(name, kernel);
            vm.wait_until_ready();
            vm
        })
        .collect();
    for vm in &mut vms {
        vm.wait_for_memory("its cushion", MOVING, |memory| {
            memory.cushion.is_some_and(|cushion| cushion.size > Bytes::ZERO && cushion.held >= cushion.size)
        });
        vm.step(KEPT, MOVING);
    }
    vms
}

fn host() -> Host {
    Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12)
}

#[test]
fn guests_that_fill_memory_quickly_lose_no_process() {
    const BUDGET: Bytes = Bytes::mib(800);
    host().memory(Bytes::gib(3)).usually(Duration::from_secs(150)).run(|| {
        let mut vms = start(&["a", "b", "c"]);
        // It looks so seldom that nobody is granted anything in time but by what it takes.
        let budget = format!("{}M", BUDGET.0 >> 20);
        let daemon = Daemon::with(Printed::Yes, &["--interval", "5s", "--budget", &budget]);
        daemon.wait_for_rounds(2, vms.len(), MOVING);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        fill(&mut vms, BUDGET, 12, 2, &mut random);
        let took: Bytes = vms.iter().map(|vm| vm.memory().counters.oom_deflated).sum();
        assert!(took > Bytes::ZERO, "nobody ever needed its cushion");
        finish(vms);
    });
}

/// How long ten guests are at work, in seconds, where the variable says nothing else.
const USUAL_SECONDS: u64 = 360;
const SECONDS: &str = "BALLAST_CUSHION_SECONDS";
/// What the ten may fill at the same time, in MiB: the budget has room for that beside what they use at rest.
const ROOM: u64 = 400;
/// A guest that took of its cushion is granted more within this, in 99 of 100 cases.
const ANSWER: Duration = Duration::from_millis(150);
/// What a guest takes within this is one event.
const BURST: Duration = Duration::from_secs(2);
/// Looks at what the host holds are this far apart.
const LOOK: Duration = Duration::from_secs(2);
/// So much of each guest's memory lies in huge pages in the end, in percent.
const HUGE: u64 = 90;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What guests may fill together.
struct Room {
    left: Mutex<u64>,
    given_back: Condvar,
}

impl Room {
    /// Whether there was room for `amount` before `end`.
    fn take(&self, amount: u64, end: Instant) -> bool {
        let patience = end.saturating_duration_since(Instant::now());
        let waited = self.given_back.wait_timeout_while(lock(&self.left), patience, |left| *left < amount);
        let (mut left, out_of_time) = waited.unwrap_or_else(PoisonError::into_inner);
        if !out_of_time.timed_out() {
            *left -= amount;
        }
        !out_of_time.timed_out()
    }

    fn give_back(&self, amount: u64) {
        *lock(&self.left) += amount;
        self.given_back.notify_all();
    }
}

/// Fills memory at random and gives it back, until `end`.
fn work(vm: &mut Vm, seed: u64, room: &Room, end: Instant) {
    let mut random = Random(seed);
    loop {
        vm.step(&format!("rest:{}ms", random.below(4000)), MOVING);
        let size = LEAST + random.below(MOST - LEAST);
        if !room.take(size, end) {
            return;
        }
        vm.step(&format!("grow:{size}M:{}ms", size * 1000 / RATE), MOVING);
        vm.step(&format!("rest:{}ms", random.below(4000)), MOVING);
        vm.step("release", MOVING);
        room.give_back(size);
    }
}

/// Notes each moment at which a guest took pages of its balloon.
fn follow(name: &str, takings: &Mutex<Vec<Instant>>) {
    let source = EventSource::new(runtime::socket(name).expect("there is a runtime directory"));
    block_on(source.listen(|event| {
        if event.event == EventKind::DeflatedOnOom {
            lock(takings).push(Instant::now());
        }
    }));
}

/// What the daemon did about guests that took of their cushions.
#[derive(Default)]
struct Answers {
    waits: Vec<Duration>,
    /// Some took so little that nothing was to be done.
    unanswered: usize,
}

impl Answers {
    /// Adds what `daemon` did about the first taking of each burst.
    fn add(&mut self, daemon: &Daemon, name: &str, takings: &[Instant], since: Instant) {
        let mut last: Option<Instant> = None;
        for &at in takings {
            let is_first = last.is_none_or(|last| at.duration_since(last) > BURST);
            last = Some(at);
            if !is_first || at < since {
                continue;
            }
            match daemon.grants(name, at).first() {
                Some(granted) if granted.duration_since(at) < BURST => {
                    self.waits.push(granted.duration_since(at));
                }
                _ => self.unanswered += 1,
            }
        }
    }

    /// The wait that so many percent do not pass.
    fn percentile(&mut self, percent: usize) -> Duration {
        self.waits.sort_unstable();
        let place = (self.waits.len() * percent / 100).min(self.waits.len().saturating_sub(1));
        self.waits.get(place).copied().unwrap_or_default()
    }
}

fn memory_of(name: &str) -> MemoryStatus {
    let socket = runtime::socket(name).expect("there is a runtime directory");
    let answer = block_on(Client::new(socket).with_timeout(MOVING).memory());
    answer.unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// What the host held at most for these guests. It is beyond the budget by what lay in their cushions, at most.
fn watch(names: &[String], budget: Bytes, is_over: &AtomicBool) -> Bytes {
    let mut most = Bytes::ZERO;
    while !is_over.load(Ordering::Relaxed) {
        let all: Vec<MemoryStatus> = names.iter().map(|name| memory_of(name)).collect();
        let held: Bytes = all.iter().filter_map(|memory| memory.host_rss).sum();
        let cushions: Bytes = all.iter().map(cushion).sum();
        assert!(held <= budget + cushions, "{held} of {budget}, with cushions of {cushions}: {all:#?}");
        most = most.max(held);
        thread::sleep(LOOK);
    }
    most
}

/// What part of the guest's memory lies in huge pages, in percent.
fn huge(vm: &Vm) -> u64 {
    let smaps = vm.smaps();
    let all = sum(&smaps, Of::Guest, &["Rss"]).0.max(1);
    sum(&smaps, Of::Guest, &["AnonHugePages"]).0 * 100 / all
}

#[test]
#[ignore = "takes many minutes in the lab: make test-long"]
fn ten_guests_share_a_budget_through_deaths_of_the_daemon() {
    const BUDGET: Bytes = Bytes::mib(1300);
    const DAEMONS: u32 = 3;
    let seconds = std::env::var(SECONDS).ok().and_then(|text| text.parse().ok()).unwrap_or(USUAL_SECONDS);
    let host = host().memory(Bytes::gib(5)).cpus(2).with_variables(&[SECONDS]);
    host.usually(Duration::from_secs(300 + seconds)).run(|| {
        let mut vms = start(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]);
        let names: Vec<String> = vms.iter().map(|vm| vm.name().to_owned()).collect();
        // They hear events until the guests end.
        let takings: Vec<Arc<Mutex<Vec<Instant>>>> = names
            .iter()
            .map(|name| {
                let (takings, name) = (Arc::default(), name.clone());
                let noted = Arc::clone(&takings);
                thread::spawn(move || follow(&name, &noted));
                takings
            })
            .collect();
        let room = Room { left: Mutex::new(ROOM), given_back: Condvar::new() };
        let part = Duration::from_secs(seconds) / DAEMONS;
        let end = Instant::now() + part * DAEMONS;
        let is_over = AtomicBool::new(false);
        let mut answers = Answers::default();
        let most = thread::scope(|scope| {
            let watcher = scope.spawn(|| watch(&names, BUDGET, &is_over));
            let workers: Vec<_> = (1u64..)
                .zip(&mut vms)
                .map(|(seed, vm)| {
                    let room = &room;
                    scope.spawn(move || work(vm, seed.wrapping_mul(0x2545_f491_4f6c_dd1d), room, end))
                })
                .collect();
            let mut done = Ok(());
            let mut workers = Some(workers);
            for number in 1..=DAEMONS {
                let since = Instant::now();
                // Dropped, it is killed; the next one knows nothing.
                let daemon = Daemon::start(BUDGET);
                thread::sleep((end - part * (DAEMONS - number)).saturating_duration_since(Instant::now()));
                if number == DAEMONS {
                    done = workers.take().into_iter().flatten().try_for_each(|worker| worker.join());
                    thread::sleep(MOVING);
                }
                for (name, takings) in names.iter().zip(&takings) {
                    answers.add(&daemon, name, &lock(takings).clone(), since);
                }
            }
            is_over.store(true, Ordering::Relaxed);
            done.expect("all guests do their work");
            watcher.join().expect("the host holds no more than it may")
        });
        let (half, p99) = (answers.percentile(50), answers.percentile(99));
        println!(
            "{} times a guest that took of its cushion was granted more, after {half:?} (p50), {p99:?} (p99) and {:?} \
             at most; {} times it took little",
            answers.waits.len(),
            answers.percentile(100),
            answers.unanswered
        );
        println!("the host held {most} at most, with a budget of {BUDGET}");
        for vm in &vms {
            let memory = vm.memory();
            println!(
                "{}: {} % in huge pages, target {}, actual {}, took {}, {:?}, {:?}",
                vm.name(),
                huge(vm),
                memory.target,
                memory.actual,
                memory.counters.oom_deflated,
                memory.cushion,
                memory.plug
            );
        }
        let huge: Vec<u64> = vms.iter().map(huge).collect();
        finish(vms);
        assert!(p99 < ANSWER, "{p99:?}");
        assert!(huge.iter().all(|percent| *percent >= HUGE), "{huge:?}");
    });
}
