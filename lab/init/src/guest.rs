//! A guest: does what its kernel's command line says.
//!
//! ```text
//! ballast.load=STEP,STEP...   what the guest's memory does (see `load`)
//! ballast.repeat=N            does the steps N times (default 1)
//! ballast.console             afterwards takes steps from the console, one a line;
//!                             answers `DONE step` or `ERROR reason`; a step may be a `transfer` as well
//! ballast.agent               starts /bin/ballast-agent first
//! ballast.without=NAME        does not load this module
//! ballast.hostile=...         first of all attacks the guest's devices (see `hostile`)
//! ballast.end=END             then: poweroff (default), reboot, panic or hang
//! ```
//! With the kernel's own `reboot=t` a reboot is a triple fault.
//! It prints `INIT` first of all, `READY linux=VERSION cpus=N memory=N kB` when its modules are loaded, and before it ends
//! `SUMMARY oom_kills=N`, the processes that died for lack of memory.
//! The power button ends it with a power-off at any time.
//!
//! The load runs in a process of its own: the kernel can kill that one when
//! memory runs out, and the summary then tells.

use std::fs::{self, File};
use std::io::{BufRead, Read};
use std::process::Command;
use std::thread;

use lab_init::modules;
use lab_init::system::{End, end};

use crate::hostile;
use crate::load::Load;
use crate::transfer::Transfer;

/// The event of a power button that goes down (`linux/input-event-codes.h`).
const KEY_POWER: u16 = 116;
const EV_KEY: u16 = 1;
/// `struct input_event` on x86-64: a time of 16 bytes, type, code, value.
const INPUT_EVENT: usize = 24;

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
struct Orders {
    load: String,
    repeat: u32,
    console: bool,
    agent: bool,
    end: End,
}

impl Orders {
    fn parse(cmdline: &str) -> Result<Self, String> {
        let mut orders =
            Self { load: String::new(), repeat: 1, console: false, agent: false, end: End::PowerOff };
        for word in cmdline.split_whitespace() {
            let Some(order) = word.strip_prefix("ballast.") else { continue };
            match order.split_once('=') {
                Some(("load", steps)) => orders.load = steps.to_owned(),
                Some(("repeat", count)) => {
                    orders.repeat =
                        count.parse().map_err(|_| format!("`{count}` is no number of repeats"))?;
                }
                Some(("end", name)) => orders.end = end_named(name)?,
                // Done before any other order is read.
                Some(("hostile" | "without", _)) => {}
                None if order == "console" => orders.console = true,
                None if order == "agent" => orders.agent = true,
                _ => return Err(format!("`{word}` is no order: use load=, repeat=, console, agent or end=")),
            }
        }
        Ok(orders)
    }
}

fn end_named(name: &str) -> Result<End, String> {
    match name {
        "poweroff" => Ok(End::PowerOff),
        "reboot" => Ok(End::Reboot),
        "panic" => Ok(End::Panic),
        "hang" => Ok(End::Hang),
        _ => Err(format!("`{name}` is no end: use poweroff, reboot, panic or hang")),
    }
}

/// Process 1 of a guest.
pub fn main() -> ! {
    println!("INIT");
    hostile::attack_before(modules::load_listed);
    thread::spawn(watch_power_buttons);
    let orders = match Orders::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default()) {
        Ok(orders) => orders,
        Err(error) => {
            println!("ERROR {error}");
            end(End::PowerOff)
        }
    };
    if orders.agent
        && let Err(error) = Command::new("/bin/ballast-agent").spawn()
    {
        println!("ERROR the agent does not start: {error}");
    }
    println!("{}", ready());
    if !orders.load.is_empty() || orders.console {
        let console = if orders.console { "console" } else { "" };
        let worker = Command::new("/init").args([&orders.load, &orders.repeat.to_string(), console]).status();
        match worker {
            Ok(status) if status.success() => {}
            Ok(status) => println!("LOAD FAILED {status}"),
            Err(error) => println!("LOAD FAILED {error}"),
        }
    }
    println!("SUMMARY oom_kills={}", oom_kills());
    end(orders.end)
}

/// The line that says what this guest is.
fn ready() -> String {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = text("/proc/cpuinfo").lines().filter(|line| line.starts_with("processor")).count();
    let memory = text("/proc/meminfo");
    let memory =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or("?").trim().to_owned();
    format!("READY linux={} cpus={cpus} memory={memory}", text("/proc/sys/kernel/osrelease").trim())
}

/// The process that holds the guest's memory: `/init STEPS REPEAT console|""`.
pub fn worker() -> i32 {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [steps, repeat, console] = arguments.as_slice() else {
        eprintln!("guest-init is the first process of the lab's machines. It does nothing elsewhere.");
        return 2;
    };
    let mut load = Load::default();
    for _ in 0..repeat.parse().unwrap_or(1) {
        if let Err(error) = load.run_all(steps) {
            println!("ERROR {error}");
            return 1;
        }
    }
    if console == "console" {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let line = line.trim();
            if line == "end" {
                break;
            }
            let done = match Transfer::parse(line) {
                Some(transfer) => transfer.run(),
                None => load.run(line),
            };
            match done {
                Ok(()) => println!("DONE {line}"),
                Err(error) => println!("ERROR {error}"),
            }
        }
    }
    0
}

/// Processes killed for lack of memory since the guest booted, as `/proc/vmstat` says.
pub fn oom_kills() -> u64 {
    fs::read_to_string("/proc/vmstat")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
        .unwrap_or(0)
}

fn watch_power_buttons() {
    let Ok(devices) = fs::read_dir("/dev/input") else { return };
    for device in devices.flatten() {
        if let Ok(events) = File::open(device.path()) {
            thread::spawn(move || watch(events));
        }
    }
}

fn watch(mut events: File) {
    let mut event = [0; INPUT_EVENT];
    while events.read_exact(&mut event).is_ok() {
        let field = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        let pressed = event[20] != 0;
        if field(16) == EV_KEY && field(18) == KEY_POWER && pressed {
            println!("POWER BUTTON");
            end(End::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_among_the_kernels_own_words() {
        let orders = Orders::parse(
            "console=ttyS0 ballast.load=grow:64M:2s,hold:1s ballast.agent ballast.end=panic quiet\n",
        );
        let expected = Orders {
            load: "grow:64M:2s,hold:1s".to_owned(),
            repeat: 1,
            console: false,
            agent: true,
            end: End::Panic,
        };
        assert_eq!(orders, Ok(expected));
    }

    #[test]
    fn wrong_orders_are_refused_with_a_reason() {
        for cmdline in ["ballast.repeat=x", "ballast.end=never", "ballast.x=1", "ballast.x"] {
            assert!(Orders::parse(cmdline).is_err(), "{cmdline}");
        }
    }
}
