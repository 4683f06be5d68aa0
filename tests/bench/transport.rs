//! What notifications and interrupts cost on each transport.
//!
//! A guest asks its entropy device for 64 bytes, again and again: each request is one notification of
//! the device and one interrupt. First they are counted without a trace, then the host's kernel traces
//! every exit: what each is for, and how many instructions lie between it and the next entry.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use lab::Kernel;

use crate::trace::{self, Counts, INTERRUPT_CONTROLLERS};
use crate::vm::{Transport, USUALLY, guest};

/// Requests that are counted, beyond as many that are not.
const REQUESTS: u32 = 1000;
/// Requests that are traced.
const TRACED: u32 = 200;
/// Nothing else may disturb the guest or its devices.
const ARGUMENTS: [&str; 4] = ["--statistics-interval", "0", "--no-agent", "--no-free-page-reporting"];
/// What is traced.
const EVENTS: [&str; 6] =
    ["kvm_exit", "kvm_entry", "kvm_userspace_exit", "kvm_mmio", "kvm_eoi", "kvm_inj_virq"];
/// Room for all of it.
const BUFFER_KIB: &str = "16384";

/// What an exit is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Purpose {
    /// The driver tells its device of a request, and the host's kernel passes it on.
    Notification,
    /// The driver reads or writes a register that ballast answers.
    Register,
    /// The guest ends an interrupt.
    EndOfInterrupt,
    /// Something else, by the processor's reason.
    Other(String),
}

/// Exits for one purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Exits {
    count: u64,
    /// Those that ballast itself had to see to.
    to_ballast: u64,
    /// Until the guest went on.
    instructions: u64,
}

/// What a trace tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct Traced {
    exits: BTreeMap<Purpose, Exits>,
    /// Interrupts that came in and were ended, and the instructions of guest and host between.
    interrupts: u64,
    interrupt_instructions: u64,
}

/// An exit whose entry has not come yet.
struct Exit {
    at: u64,
    reason: String,
    to_device: bool,
    to_ballast: bool,
    ends_interrupt: bool,
}

/// Compares the transports.
///
/// # Errors
/// Where a VM can't be started, or the host does not trace.
pub fn compare() -> Result<()> {
    println!("\nrequests of 64 bytes to the entropy device: one notification and one interrupt each");
    println!(
        "instructions are those of host and guest; the lines behind the first are traced, which costs some"
    );
    println!("transport                          a request has   to ballast   instructions each");
    for transport in Transport::ALL {
        measure(transport).with_context(|| transport.name())?;
    }
    Ok(())
}

fn measure(transport: Transport) -> Result<()> {
    let images = Kernel::V6_1.guest_images()?;
    let mut vm = guest(&images, "256M", "ballast.console", transport, &ARGUMENTS).start();
    vm.wait_until_ready();
    // The first requests pay for what comes in once.
    vm.step("random:100", USUALLY);
    let mut count = |requests: u32| -> Result<Counts> {
        let before = Counts::read(vm.pid())?;
        vm.step(&format!("random:{requests}"), USUALLY);
        Ok(Counts::read(vm.pid())?.since(before))
    };
    // What a step costs beside its requests is in both.
    let (few, many) = (count(REQUESTS)?, count(2 * REQUESTS)?);
    let each = |more: u64, less: u64| more.saturating_sub(less) as f64 / f64::from(REQUESTS);
    let exits = each(many.exits, few.exits);
    let instructions = each(many.busy.as_nanos() as u64, few.busy.as_nanos() as u64);
    let name = transport.name();
    println!("{name:<9}  request                {exits:>8.3} exits                {instructions:>12.0}");

    let trace = Traced::read(&trace_of(|| vm.step(&format!("random:{TRACED}"), USUALLY))?);
    let share = |count: u64| count as f64 / f64::from(TRACED);
    for (purpose, Exits { count, to_ballast, instructions }) in &trace.exits {
        println!(
            "{name:<9}  {:<22} {:>8.3} exits   {:>10.3}   {:>12}",
            purpose.words(),
            share(*count),
            share(*to_ballast),
            instructions / count
        );
    }
    println!(
        "{name:<9}  interrupt to its end   {:>8.3}                      {:>12}",
        share(trace.interrupts),
        trace.interrupt_instructions / trace.interrupts.max(1)
    );
    Ok(())
}

/// What KVM does meanwhile.
fn trace_of(work: impl FnOnce()) -> Result<String> {
    let enable =
        |value| EVENTS.iter().try_for_each(|event| trace::set(&format!("events/kvm/{event}/enable"), value));
    trace::set("trace_clock", "x86-tsc")?;
    trace::set("buffer_size_kb", BUFFER_KIB)?;
    trace::set("trace", "")?;
    enable("1")?;
    work();
    enable("0")?;
    trace::read()
}

impl Purpose {
    fn words(&self) -> &str {
        match self {
            Self::Notification => "notification",
            Self::Register => "a device's register",
            Self::EndOfInterrupt => "end of interrupt",
            Self::Other(reason) => reason,
        }
    }
}

impl Exit {
    fn purpose(&self) -> Purpose {
        match self {
            Self { ends_interrupt: true, .. } => Purpose::EndOfInterrupt,
            Self { to_device: true, to_ballast: true, .. } => Purpose::Register,
            Self { to_device: true, .. } => Purpose::Notification,
            Self { reason, .. } => Purpose::Other(reason.clone()),
        }
    }
}

impl Traced {
    /// Reads lines such as `vcpu0-99 [000] d.... 12345678: kvm_exit: vcpu 0 reason npf rip 0x...` of one vCPU.
    fn read(trace: &str) -> Self {
        let mut all = Self::default();
        let (mut exit, mut injected): (Option<Exit>, Option<u64>) = (None, None);
        for (at, event, detail) in trace.lines().filter_map(event) {
            match (event, &mut exit) {
                ("kvm_exit", _) => {
                    let reason = detail.split_once("reason ").map_or(detail, |(_, rest)| rest);
                    let reason = reason.split_whitespace().next().unwrap_or_default().to_owned();
                    let (to_device, to_ballast, ends_interrupt) = (false, false, false);
                    exit = Some(Exit { at, reason, to_device, to_ballast, ends_interrupt });
                }
                ("kvm_mmio", Some(exit)) => {
                    let address =
                        detail.split_once("gpa 0x").and_then(|(_, rest)| rest.split_whitespace().next());
                    let address = address.and_then(|address| u64::from_str_radix(address, 16).ok());
                    exit.to_device |=
                        address.is_some_and(|address| !INTERRUPT_CONTROLLERS.contains(&address));
                }
                ("kvm_userspace_exit", Some(exit)) => exit.to_ballast = true,
                ("kvm_eoi", Some(exit)) => exit.ends_interrupt = true,
                ("kvm_inj_virq", _) => injected = Some(at),
                ("kvm_entry", _) => {
                    let Some(exit) = exit.take() else { continue };
                    let exits = all.exits.entry(exit.purpose()).or_default();
                    exits.count += 1;
                    exits.to_ballast += u64::from(exit.to_ballast);
                    exits.instructions += at.saturating_sub(exit.at);
                    if exit.ends_interrupt
                        && let Some(begun) = injected.take()
                    {
                        all.interrupts += 1;
                        all.interrupt_instructions += at.saturating_sub(begun);
                    }
                }
                _ => {}
            }
        }
        all
    }
}

/// Moment, event and the rest of a line.
fn event(line: &str) -> Option<(u64, &str, &str)> {
    let (front, rest) = line.split_once(": ")?;
    let (event, detail) = rest.split_once(": ")?;
    Some((front.split_whitespace().next_back()?.parse().ok()?, event, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_told_apart_by_what_they_are_for() {
        let trace = "# tracer: nop\n\
            vcpu0-9 [000] d.... 100: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x2\n\
            vcpu0-9 [000] ..... 110: kvm_mmio: mmio write len 4 gpa 0xd0001050 val 0x0\n\
            vcpu0-9 [000] d.... 150: kvm_inj_virq: IRQ 0x21\n\
            vcpu0-9 [000] d.... 160: kvm_entry: vcpu 0, rip 0x5\n\
            vcpu0-9 [000] d.... 200: kvm_exit: vcpu 0 reason npf rip 0x6 info1 0x2\n\
            vcpu0-9 [000] ..... 210: kvm_mmio: mmio unsatisfied-read len 4 gpa 0xd0001060 val 0x0\n\
            vcpu0-9 [000] ..... 220: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)\n\
            vcpu0-9 [000] d.... 290: kvm_entry: vcpu 0, rip 0x7\n\
            vcpu0-9 [000] d.... 300: kvm_exit: vcpu 0 reason npf rip 0x8 info1 0x2\n\
            vcpu0-9 [000] ..... 310: kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0\n\
            vcpu0-9 [000] ..... 320: kvm_eoi: apicid 0 vector 33\n\
            vcpu0-9 [000] d.... 350: kvm_entry: vcpu 0, rip 0x9\n\
            vcpu0-9 [000] d.... 400: kvm_exit: vcpu 0 reason hlt rip 0xa info1 0x0\n\
            vcpu0-9 [000] d.... 480: kvm_entry: vcpu 0, rip 0xb\n";
        let found = Traced::read(trace);
        let exits = |to_ballast, instructions| Exits { count: 1, to_ballast, instructions };
        let expected = BTreeMap::from([
            (Purpose::Notification, exits(0, 60)),
            (Purpose::Register, exits(1, 90)),
            (Purpose::EndOfInterrupt, exits(0, 50)),
            (Purpose::Other("hlt".to_owned()), exits(0, 80)),
        ]);
        assert_eq!(found, Traced { exits: expected, interrupts: 1, interrupt_instructions: 200 });
    }
}
