//! QEMU's software emulation of a processor with SVM: the one place that knows its arguments.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use api::units::Bytes;

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The emulated processor, without what the emulation lacks (it would warn of each).
const PROCESSOR: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,\
                         -nrip-save,-xsavec";
/// How often a running emulator is looked after.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// An emulated PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Processors. A counted machine has one.
    pub cpus: usize,
    /// Memory.
    pub memory: Bytes,
    /// What its processors are.
    pub kind: Kind,
}

/// What runs a machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The emulator, as fast as it can.
    Emulated,
    /// The emulator, which counts instructions as time and draws no randomness: two runs are the same to the bit.
    Counted,
    /// This host's processor, by its KVM: the machine nests.
    Nested,
}

impl Machine {
    /// The command that boots `kernel` with `initrd` on it. `line` follows the usual words of the kernel's
    /// command line. The emulator dies with the thread that starts it.
    pub fn command(&self, kernel: &Path, initrd: &Path, line: &str) -> Command {
        let mut append = "console=ttyS0 reboot=t panic=1 quiet tsc=reliable".to_owned();
        // The decompressor looks for this word everywhere; the kernel itself doesn't know it
        // and would hand it to the first process in front of all others.
        let mut last = "";
        let mut qemu = Command::new(PROGRAM);
        // QEMU 7.2 with one thread for each processor delivers interrupts between processors at
        // moments at which SVM holds them back: hosts oops in KVM's entry code, guests triple-fault.
        let accelerator = match self.kind {
            Kind::Nested => "kvm",
            _ if self.cpus > 1 => "tcg,thread=single",
            _ => "tcg",
        };
        qemu.args(["-M", "q35", "-accel", accelerator, "-nodefaults", "-no-user-config", "-display", "none"]);
        qemu.args(["-no-reboot", "-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory.0 >> 20)]);
        match self.kind {
            Kind::Emulated => qemu.args(["-cpu", PROCESSOR]),
            Kind::Nested => qemu.args(["-cpu", "host"]),
            Kind::Counted => {
                append += " norandmaps random.trust_cpu=off";
                last = " nokaslr";
                qemu.args(["-cpu", &format!("{PROCESSOR},-rdrand")]);
                qemu.args(["-icount", "shift=0,sleep=off", "-seed", "1"]);
                qemu.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"])
            }
        };
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        qemu.args(["-append", &format!("{append}{line}{last}")]);
        let die_with_us = || {
            // SAFETY: the call has no preconditions.
            match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: prctl is an async-signal-safe system call; nothing is allocated.
        unsafe { qemu.pre_exec(die_with_us) };
        qemu
    }
}

/// How an emulator ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Left(ExitStatus),
    /// Killed at its limit.
    TooLate,
    /// Killed because somebody asked for it.
    Stopped,
}

/// Waits for an emulator's end; kills it after `limit`, or once `stopped` says so.
///
/// # Errors
/// Where its end can't be learned.
pub fn wait(child: &mut Child, limit: Duration, stopped: impl Fn() -> bool) -> io::Result<Ended> {
    let start = Instant::now();
    let reason = loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::Left(status));
        }
        if stopped() {
            break Ended::Stopped;
        }
        if start.elapsed() > limit {
            break Ended::TooLate;
        }
        thread::sleep(LOOK_AGAIN);
    };
    child.kill()?;
    child.wait()?;
    Ok(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Command) -> String {
        let all = command.get_args().map(|a| a.to_string_lossy().into_owned());
        all.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_counted_machine_has_no_clock_and_no_chance_of_its_own() {
        let machine = Machine { cpus: 1, memory: Bytes::gib(2), kind: Kind::Counted };
        let counted = words(&machine.command(Path::new("k"), Path::new("i"), " more"));
        for word in ["-icount", "clock=vm", "-rdrand", "norandmaps", "-m 2048M", "more"] {
            assert!(counted.contains(word), "{word}: {counted}");
        }
        let timed = Machine { cpus: 4, kind: Kind::Emulated, ..machine };
        let timed = words(&timed.command(Path::new("k"), Path::new("i"), ""));
        assert!(timed.contains("thread=single") && !timed.contains("icount"), "{timed}");
        let nested = Machine { cpus: 4, kind: Kind::Nested, ..machine };
        let nested = words(&nested.command(Path::new("k"), Path::new("i"), ""));
        assert!(nested.contains("-accel kvm") && nested.contains("-cpu host"), "{nested}");
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let sleeper = || Command::new("sleep").arg("600").spawn().expect("sleep runs");
        let long = Duration::from_secs(600);
        assert_eq!(wait(&mut sleeper(), Duration::ZERO, || false).ok(), Some(Ended::TooLate));
        assert_eq!(wait(&mut sleeper(), long, || true).ok(), Some(Ended::Stopped));
        let mut short = Command::new("true").spawn().expect("true runs");
        assert!(matches!(wait(&mut short, long, || false), Ok(Ended::Left(status)) if status.success()));
    }
}
