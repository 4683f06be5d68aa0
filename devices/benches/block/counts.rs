//! What the host spends on a request, as its kernel counts it.

use perf_event::events::{Hardware, Software, Tracepoint};
use perf_event::{Builder, Counter};

/// Counters of this thread, and of those that it starts from now on. None where they can't be had.
pub struct Counting {
    calls: Option<Counter>,
    instructions: Option<Counter>,
    /// Nanoseconds.
    processor: Option<Counter>,
}

impl Counting {
    /// Nothing is counted yet.
    pub fn new() -> Self {
        Self {
            // Takes root.
            calls: std::fs::read_to_string("/sys/kernel/tracing/events/raw_syscalls/sys_enter/id")
                .ok()
                .and_then(|id| id.trim().parse().ok())
                .and_then(|id| counter(&mut Builder::new(Tracepoint::with_id(id)))),
            // Takes a processor whose counters can be read, which most virtual ones' can't.
            instructions: counter(&mut Builder::new(Hardware::INSTRUCTIONS)),
            processor: counter(&mut Builder::new(Software::TASK_CLOCK)),
        }
    }

    fn each(&mut self) -> impl Iterator<Item = &mut Counter> {
        [&mut self.calls, &mut self.instructions, &mut self.processor].into_iter().flatten()
    }

    /// Counts from now on.
    pub fn begin(&mut self) {
        for counter in self.each() {
            counter.enable().unwrap();
        }
    }

    /// What it came to for each of so many requests, in words.
    pub fn end(&mut self, requests: u64) -> String {
        for counter in self.each() {
            counter.disable().unwrap();
        }
        let each = |counter: &mut Option<Counter>| {
            counter.as_mut().map(|counter| counter.read().unwrap() as f64 / requests as f64)
        };
        let unknown = || "not known".to_owned();
        let calls = each(&mut self.calls).map_or_else(unknown, |calls| format!("{calls:.2}"));
        let instructions = each(&mut self.instructions).map_or_else(unknown, |count| format!("{count:.0}"));
        let time = each(&mut self.processor).map_or_else(unknown, |time| format!("{:.1} us", time / 1000.0));
        format!("a request: system calls {calls}, instructions {instructions}, processor {time}")
    }
}

fn counter(builder: &mut Builder<'_>) -> Option<Counter> {
    builder.inherit(true).include_kernel().build().ok()
}
