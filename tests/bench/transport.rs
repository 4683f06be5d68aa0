//! What notifications and interrupts cost on each transport.
//!
//! A guest asks its entropy device for 64 bytes, again and again: each request is one notification of
//! the device and one interrupt. First they are counted without a trace, then the host's kernel traces
//! every exit: what each is for, and how many instructions lie between it and the next entry.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use lab::Kernel;

use crate::trace::{self, Counts, INTERRUPT_CONTROLLERS, PAGE};
use crate::vm::{Transport, USUALLY, guest};

/// Requests that are counted, beyond as many that are not.
const REQUESTS: u32 = 1000;
/// Requests that are traced.
const TRACED: u32 = 200;
/// Nothing else may disturb the guest or its devices.
const ARGUMENTS: [&str; 4] = ["--statistics-interval", "0", "--no-agent", "--no-free-page-reporting"];
/// What is traced.
const EVENTS: [&str; 7] = [
    "kvm/kvm_exit",
    "kvm/kvm_entry",
    "kvm/kvm_userspace_exit",
    "kvm/kvm_mmio",
    "kvm/kvm_eoi",
    "kvm/kvm_inj_virq",
    "sched/sched_switch",
];
/// Where a virtio-mmio device is notified (virtio 1.2, section 4.2.2), in a window of a page.
const QUEUE_NOTIFY: u64 = 0x050;
/// Room for all of it.
const BUFFER_KIB: &str = "16384";

/// What an exit is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Purpose {
    /// The driver tells its device of a request, and the host's kernel passes it on.
    Notification,
    /// The driver reads or writes another register of its device: it asks for an interrupt's reason, or
    /// says that it has seen it.
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
    /// Of the vCPU's thread until the guest went on.
    instructions: u64,
}

/// What a trace tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct Traced {
    exits: BTreeMap<Purpose, Exits>,
    /// Interrupts that came in and were ended, and the instructions of the vCPU, guest and host, between.
    interrupts: u64,
    interrupt_instructions: u64,
}

/// An exit whose entry has not come yet.
struct Exit {
    at: u64,
    purpose: Purpose,
    to_ballast: bool,
}

/// Compares the transports.
///
/// # Errors
/// Where a VM can't be started, or the host does not trace.
pub fn compare() -> Result<()> {
    println!("\nrequests of 64 bytes to the entropy device: one notification and one interrupt each");
    println!("a request: all threads of the VM, guest and host. What follows is traced, which costs some: a");
    println!(
        "notification from its exit to the next entry; an interrupt from its injection until the guest ends"
    );
    println!("it, and what its handler asks of the device; any other exit to the next entry");
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

    let trace = Traced::read(transport, &trace_of(|| vm.step(&format!("random:{TRACED}"), USUALLY))?);
    let row = |what: &str, of: Exits, each: u64| {
        let share = |count: u64| count as f64 / f64::from(TRACED);
        let (exits, to_ballast) = (share(of.count), share(of.to_ballast));
        println!(
            "{name:<9}  {what:<22} {exits:>8.3} exits   {to_ballast:>10.3}   {:>12}",
            of.instructions / each.max(1)
        );
    };
    let of = |purpose| trace.exits.get(&purpose).copied().unwrap_or_default();
    let notifications = of(Purpose::Notification);
    row("notification", notifications, notifications.count);
    let (registers, ends) = (of(Purpose::Register), of(Purpose::EndOfInterrupt));
    let interrupt = Exits {
        count: registers.count + ends.count,
        to_ballast: registers.to_ballast + ends.to_ballast,
        instructions: registers.instructions + trace.interrupt_instructions,
    };
    row("interrupt", interrupt, trace.interrupts);
    for (purpose, exits) in &trace.exits {
        match purpose {
            Purpose::Notification => {}
            Purpose::Register => row("  register for it", *exits, exits.count),
            Purpose::EndOfInterrupt => row("  end of interrupt", *exits, exits.count),
            Purpose::Other(reason) => row(&format!("other: {reason}"), *exits, exits.count),
        }
    }
    Ok(())
}

/// What KVM does meanwhile.
fn trace_of(work: impl FnOnce()) -> Result<String> {
    let enable =
        |value| EVENTS.iter().try_for_each(|event| trace::set(&format!("events/{event}/enable"), value));
    trace::set("trace_clock", "x86-tsc")?;
    trace::set("buffer_size_kb", BUFFER_KIB)?;
    trace::set("trace", "")?;
    enable("1")?;
    work();
    enable("0")?;
    trace::read()
}

impl Traced {
    /// Reads lines such as `vcpu0-99 [000] d.... 12345678: kvm_exit: vcpu 0 reason npf rip 0x...` of one vCPU.
    fn read(transport: Transport, trace: &str) -> Self {
        let mut all = Self::default();
        let (mut exit, mut injected): (Option<Exit>, Option<u64>) = (None, None);
        // What others did meanwhile is none of the vCPU's time.
        let (mut vcpu, mut away, mut away_since) = (String::new(), 0, None);
        for (task, at, event, detail) in trace.lines().filter_map(event) {
            let own = at - away;
            match (event, &mut exit) {
                ("sched_switch", _) if detail.contains(&format!("next_pid={vcpu} ")) => {
                    away += away_since.take().map_or(0, |since| at - since);
                }
                ("sched_switch", _) if task == vcpu => away_since = Some(at),
                ("kvm_exit", _) => {
                    task.clone_into(&mut vcpu);
                    let reason = word_behind(detail, "reason ").unwrap_or_default().to_owned();
                    exit = Some(Exit { at: own, purpose: Purpose::Other(reason), to_ballast: false });
                }
                ("kvm_mmio", Some(exit)) => {
                    let address =
                        word_behind(detail, "gpa 0x").and_then(|word| u64::from_str_radix(word, 16).ok());
                    if let Some(address) = address.filter(|address| !INTERRUPT_CONTROLLERS.contains(address))
                    {
                        let notifies = transport == Transport::Pci || address % PAGE == QUEUE_NOTIFY;
                        exit.purpose = if notifies { Purpose::Notification } else { Purpose::Register };
                    }
                }
                ("kvm_userspace_exit", Some(exit)) => exit.to_ballast = true,
                ("kvm_eoi", Some(exit)) => exit.purpose = Purpose::EndOfInterrupt,
                ("kvm_inj_virq", _) => injected = Some(own),
                ("kvm_entry", _) => {
                    let Some(exit) = exit.take() else { continue };
                    if exit.purpose == Purpose::EndOfInterrupt
                        && let Some(begun) = injected.take()
                    {
                        all.interrupts += 1;
                        all.interrupt_instructions += own - begun;
                    }
                    let exits = all.exits.entry(exit.purpose).or_default();
                    exits.count += 1;
                    exits.to_ballast += u64::from(exit.to_ballast);
                    exits.instructions += own - exit.at;
                }
                _ => {}
            }
        }
        all
    }
}

/// Process, moment, event and the rest of a line.
fn event(line: &str) -> Option<(&str, u64, &str, &str)> {
    let (front, rest) = line.split_once(": ")?;
    let (event, detail) = rest.split_once(": ")?;
    let (_, process) = front.split_once('[')?.0.trim_end().rsplit_once('-')?;
    Some((process, front.split_whitespace().next_back()?.parse().ok()?, event, detail))
}

fn word_behind<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    text.split_once(mark)?.1.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_told_apart_by_what_they_are_for() {
        let trace = "# tracer: nop\n\
            vcpu0-9 [000] d.... 100: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x2\n\
            vcpu0-9 [000] ..... 110: kvm_mmio: mmio write len 4 gpa 0xd0001050 val 0x0\n\
            vcpu0-9 [000] d.... 115: sched_switch: prev_comm=vcpu0 prev_pid=9 ==> next_comm=io next_pid=8 next_prio=1\n\
            io-8    [000] d.... 135: sched_switch: prev_comm=io prev_pid=8 ==> next_comm=vcpu0 next_pid=9 next_prio=1\n\
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
        let exits = |to_ballast, instructions| Exits { count: 1, to_ballast, instructions };
        let mut expected = Traced {
            exits: BTreeMap::from([
                (Purpose::Notification, exits(0, 40)),
                (Purpose::Register, exits(1, 90)),
                (Purpose::EndOfInterrupt, exits(0, 50)),
                (Purpose::Other("hlt".to_owned()), exits(0, 80)),
            ]),
            interrupts: 1,
            interrupt_instructions: 200,
        };
        assert_eq!(Traced::read(Transport::Mmio, trace), expected);
        let acknowledged = trace.replace("d0001050", "d0001064");
        expected.exits.remove(&Purpose::Notification);
        expected.exits.insert(Purpose::Register, Exits { count: 2, to_ballast: 1, instructions: 130 });
        assert_eq!(Traced::read(Transport::Mmio, &acknowledged), expected);
        // PCI's notifications lie anywhere, and nothing else is written to while a device runs.
        let by_pci = Traced::read(Transport::Pci, &trace.replace("d0001050", "800003004"));
        assert_eq!(
            by_pci.exits[&Purpose::Notification],
            Exits { count: 2, to_ballast: 1, instructions: 130 }
        );
    }
}
