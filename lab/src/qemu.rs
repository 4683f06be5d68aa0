//! QEMU as the emulator of a host: the one place that knows its arguments, and where a host that
//! it boots finds its console.

use std::process::{Command, Stdio};

use crate::INIT;
use crate::emulator::Terminal;
use crate::machine::{Boot, Execution, UNCHANGING, WORDS, Wires};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Its package in Debian.
pub const PACKAGE: &str = "qemu-system-x86";
/// The emulated processor, without what the emulation lacks (it would warn of each).
const PROCESSOR: &str = "EPYC,+svm,+npt,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,\
                         -nrip-save,-xsavec";

/// The console of the program is the first port of a controller, and what takes files its second.
pub const WIRES: Wires =
    Wires { modules: &["virtio_pci", "virtio_console"], console: "/dev/hvc0", results: "/dev/vport0p1" };

/// The command that runs the PC.
pub fn command(boot: &Boot) -> Command {
    let mut words = WORDS.to_owned();
    // The decompressor looks for this word everywhere; the kernel itself doesn't know it
    // and would hand it to the first process in front of all others.
    let mut last = "";
    let mut qemu = Command::new(PROGRAM);
    let accelerator = match boot.execution {
        Execution::Nested => "kvm",
        // QEMU 7.2 with one thread for each processor delivers interrupts between processors at
        // moments at which SVM holds them back: hosts oops in KVM's entry code, guests triple-fault.
        _ if boot.cpus > 1 => "tcg,thread=single",
        _ => "tcg",
    };
    qemu.args(["-M", "q35", "-accel", accelerator, "-nodefaults", "-no-user-config", "-display", "none"]);
    qemu.args(["-no-reboot", "-smp", &boot.cpus.to_string(), "-m", &format!("{}M", boot.memory.0 >> 20)]);
    match boot.execution {
        Execution::Emulated => qemu.args(["-cpu", PROCESSOR]),
        Execution::Nested => qemu.args(["-cpu", "host"]),
        Execution::Counted => {
            words += UNCHANGING;
            words += " random.trust_cpu=off";
            last = " nokaslr";
            qemu.args(["-cpu", &format!("{PROCESSOR},-rdrand")]);
            qemu.args(["-icount", "shift=0,sleep=off", "-seed", "1"]);
            qemu.args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"])
        }
    };
    qemu.arg("-kernel").arg(boot.kernel).arg("-initrd").arg(boot.initrd);
    qemu.args(["-append", &format!("{words} rdinit={INIT} -- {}{last}", boot.arguments)]);
    qemu.args(["-serial", &format!("file:{}", boot.log.display())]);
    let signal = if boot.terminal == Terminal::Interactive { "off" } else { "on" };
    qemu.args(["-chardev", &format!("stdio,id=program,signal={signal}")]);
    qemu.args(["-chardev", &format!("file,id=results,path={}", boot.results.display())]);
    // Without ioeventfd the emulated CPU itself does the I/O: that is deterministic, and no slower here.
    qemu.args(["-device", "virtio-serial-pci,ioeventfd=off"]);
    qemu.args(["-device", "virtconsole,chardev=program,nr=0"]);
    qemu.args(["-device", "virtserialport,chardev=results,nr=1"]);
    match boot.terminal {
        Terminal::Interactive => qemu.stdin(Stdio::inherit()),
        _ => qemu.stdin(Stdio::null()).stdout(Stdio::piped()),
    };
    qemu
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vendor;
    use api::units::Bytes;
    use std::path::Path;

    fn words(boot: &Boot) -> String {
        let command = command(boot);
        command.get_args().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_counted_host_has_no_clock_and_no_chance_of_its_own() {
        let (path, terminal) = (Path::new("p"), Terminal::Kept);
        let (kernel, initrd, log, results) = (path, path, path, path);
        let memory = Bytes::gib(2);
        let machine = |cpus, execution, vendor| Boot {
            cpus,
            memory,
            vendor,
            execution,
            kernel,
            initrd,
            arguments: "more",
            log,
            results,
            terminal,
            references: None,
        };
        let counted = words(&machine(1, Execution::Counted, Vendor::Amd));
        for word in ["-icount", "clock=vm", "-rdrand", "norandmaps", "-m 2048M", "-- more nokaslr"] {
            assert!(counted.contains(word), "{word}: {counted}");
        }
        let timed = machine(4, Execution::Emulated, Vendor::Amd);
        assert!(words(&timed).contains("thread=single") && !words(&timed).contains("icount"));
        let nested = machine(4, Execution::Nested, Vendor::Intel);
        assert!(words(&nested).contains("-accel kvm") && words(&nested).contains("-cpu host"));
    }
}
