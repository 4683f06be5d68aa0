//! Bochs as the emulator of a host: the one place that knows its configuration, and how a host that it boots is
//! wired.
//!
//! Debian's package has VMX with extended page tables, and a debugger that must be told to go on. It boots no
//! kernel by itself: a disc with isolinux does. Every run is the same as the one before, as its clock counts
//! instructions.

use std::fmt::Write;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::emulator::Terminal;
use crate::error::files;
use crate::machine::{Boot, Execution, Machine, UNCHANGING, WORDS, Wires};
use crate::{Error, INIT, keyboard, packages};

/// The program. The command `bochs` of Debian's package is a script around it.
pub const PROGRAM: &str = "bochs-bin";
/// Packages in Debian: the program, its screen, its firmware, and what makes its disc.
pub const PACKAGES: &str = "bochs bochs-term bochsbios vgabios isolinux syslinux-common genisoimage";
/// Serial ports: the kernel's messages go to the first.
pub const WIRES: Wires = Wires { modules: &[], console: "/dev/ttyS1", results: "/dev/ttyS2" };

/// Files of other packages.
const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const VGA_BIOS: &str = "/usr/share/vgabios/vgabios.bin";
const LOADER: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const LOADER_LIBRARY: &str = "/usr/lib/syslinux/modules/bios/ldlinux.c32";

/// The emulated processor.
const PROCESSOR: &str = "corei7_skylake_x";
/// Instructions that are a second of the host's time. About as many as the emulator does in a second, so that
/// whoever waits inside waits as long as outside.
const USUAL_SPEED: u32 = 100_000_000;
/// The same for counting: an instruction is a nanosecond, as under QEMU.
const COUNTED_SPEED: u32 = 1_000_000_000;
/// What only this emulator's hosts are told. Nothing needs to be mitigated, and each mitigation is emulated. Its
/// RDRAND gives the same numbers each time, and a kernel that takes them needs no other: it finds none in a clock
/// that counts instructions, and whoever asks it for randomness would wait.
const MORE_WORDS: &str = " mitigations=off random.trust_cpu=on";
/// MiB of a host's memory that the emulator holds at most; it keeps the rest in a file.
const MOST_HELD: u64 = 2048;
/// How many times memory references can be written down in one host.
pub const RECORDS: usize = 256;
/// 2026-01-01T00:00:00Z.
const BEGIN: u32 = 1_767_225_600;

/// Makes the disc and the configuration in `directory`.
///
/// # Errors
/// Where they can't be made, or the machine can't be had.
pub fn machine(boot: &Boot, directory: &Path) -> Result<Machine, Error> {
    if boot.cpus > 1 {
        return Err(Error::Failed(format!(
            "an emulated Intel host has one processor, not {}: leave out --cpus",
            boot.cpus
        )));
    }
    let at = |name: &str| directory.join(name);
    let write = |name: &str, text: &str| fs::write(at(name), text).map_err(files(at(name).display()));
    disc(boot, directory)?;
    let (ours, theirs, name) = terminal().map_err(files("a pseudo terminal"))?;
    write("bochsrc", &configuration(boot, directory, &name))?;
    write("debugger", &debugger(boot))?;
    let file = |name: &str| File::create(at(name)).map_err(files(at(name).display()));
    let mut command = Command::new(PROGRAM);
    command.arg("-q").arg("-f").arg(at("bochsrc")).arg("-rc").arg(at("debugger"));
    // Its screen is a terminal's, which nobody looks at.
    command.env("TERM", "linux").stdin(Stdio::null()).stdout(file("screen")?).stderr(file("errors")?);
    if boot.terminal == Terminal::Interactive {
        keyboard::follow(ours.try_clone().map_err(files("a pseudo terminal"))?)?;
    }
    Ok(Machine { command, output: Some(ours), held: vec![theirs] })
}

/// What the debugger is told: to go on; and at each second `xchg bx, bx` to write references down no more.
fn debugger(boot: &Boot) -> String {
    let records = if boot.references.is_some() { RECORDS } else { 0 };
    format!("c\n{}", "trace-mem on\nc\ntrace-mem off\nc\n".repeat(records))
}

/// A pseudo terminal that changes no byte: this end, the other, and the other's path.
fn terminal() -> std::io::Result<(File, OwnedFd, String)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?.to_string_lossy().into_owned();
    let theirs: OwnedFd = File::options().read(true).write(true).open(&name)?.into();
    let mut modes = tcgetattr(&theirs)?;
    modes.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &modes)?;
    Ok((ours.into(), theirs, name))
}

/// What the kernel is told.
fn kernel_line(boot: &Boot) -> String {
    // The decompressor looks for the last word everywhere (see the same with QEMU).
    format!("{WORDS}{UNCHANGING}{MORE_WORDS} rdinit={INIT} -- {} nokaslr", boot.arguments)
}

/// A disc that boots the kernel.
fn disc(boot: &Boot, directory: &Path) -> Result<(), Error> {
    let at = |name: &str| directory.join(name);
    // The disc's maker writes into the loader that it is given.
    for (from, to) in [(LOADER, "isolinux.bin"), (LOADER_LIBRARY, "ldlinux.c32")] {
        fs::copy(from, at(to)).map_err(|source| {
            let what = format!("{from}: install what it takes with `sudo apt-get install {PACKAGES}`");
            Error::Files { what, source }
        })?;
    }
    let menu = format!(
        "default host\nprompt 0\nlabel host\n kernel /vmlinuz\n initrd /initrd\n append {}\n",
        kernel_line(boot)
    );
    fs::write(at("isolinux.cfg"), menu).map_err(files(at("isolinux.cfg").display()))?;
    let mut maker = Command::new("genisoimage");
    maker.args([
        "-quiet",
        "-input-charset",
        "utf-8",
        "-b",
        "isolinux/isolinux.bin",
        "-c",
        "isolinux/boot.cat",
    ]);
    maker.args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-graft-points"]);
    maker.arg("-o").arg(at("disc"));
    for name in ["isolinux.bin", "ldlinux.c32", "isolinux.cfg"] {
        maker.arg(format!("isolinux/{name}={}", at(name).display()));
    }
    maker.arg(format!("vmlinuz={}", boot.kernel.display())).arg(format!("initrd={}", boot.initrd.display()));
    packages::run(&mut maker).map(drop)
}

/// The file that Bochs reads.
fn configuration(boot: &Boot, directory: &Path, console: &str) -> String {
    let speed = if boot.execution == Execution::Counted { COUNTED_SPEED } else { USUAL_SPEED };
    let megabytes = boot.memory.0 >> 20;
    let (log, results) = (boot.log.display(), boot.results.display());
    let at = |name: &str| directory.join(name).display().to_string();
    let mut text = String::new();
    for line in [
        format!("memory: guest={megabytes}, host={}", megabytes.min(MOST_HELD)),
        format!("romimage: file={BIOS}, options=fastboot"),
        format!("vgaromimage: file={VGA_BIOS}"),
        format!("cpu: model={PROCESSOR}, count=1, ips={speed}, reset_on_triple_fault=0, ignore_bad_msrs=1"),
        format!("ata0-master: type=cdrom, path={}, status=inserted", at("disc")),
        "boot: cdrom".into(),
        format!("com1: enabled=1, mode=file, dev={log}"),
        format!("com2: enabled=1, mode=term, dev={console}"),
        format!("com3: enabled=1, mode=file, dev={results}"),
        format!("clock: sync=none, time0={BEGIN}, rtc_sync=0"),
        "display_library: term".into(),
        format!("log: {}", at("emulator.log")),
        // The host's end is a panic: its processor shuts down.
        "panic: action=fatal".into(),
        "error: action=report".into(),
        "info: action=ignore".into(),
    ] {
        let _ = writeln!(text, "{line}");
    }
    if let Some(references) = boot.references {
        let _ = writeln!(text, "magic_break: enabled=1\ndebugger_log: {}", references.display());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vendor;
    use api::units::Bytes;
    use std::io::{Read, Write as _};

    fn host(execution: Execution, cpus: usize) -> Boot<'static> {
        let (vendor, memory, terminal) = (Vendor::Intel, Bytes::gib(2), Terminal::Kept);
        let [kernel, initrd, log, results] = ["kernel", "initrd", "log", "results"].map(Path::new);
        let (arguments, references) = ("more", None);
        Boot {
            cpus,
            memory,
            vendor,
            execution,
            kernel,
            initrd,
            arguments,
            log,
            results,
            terminal,
            references,
        }
    }

    #[test]
    fn a_counted_hosts_instruction_is_a_nanosecond() {
        let text = |execution| configuration(&host(execution, 1), Path::new("/d"), "/dev/pts/7");
        assert!(text(Execution::Counted).contains("ips=1000000000,"));
        let usual = text(Execution::Emulated);
        for word in [
            "guest=2048, host=2048",
            "com2: enabled=1, mode=term, dev=/dev/pts/7",
            "path=/d/disc",
            "sync=none",
        ] {
            assert!(usual.contains(word), "{word}: {usual}");
        }
        let line = kernel_line(&host(Execution::Emulated, 1));
        assert!(line.contains("rdinit=/lab/init -- more nokaslr") && line.contains("norandmaps"), "{line}");
    }

    #[test]
    fn more_memory_than_the_emulator_holds_is_no_more_to_hold() {
        let large = Boot { memory: Bytes::gib(5), ..host(Execution::Emulated, 1) };
        let text = configuration(&large, Path::new("/d"), "/dev/pts/7");
        assert!(text.contains("guest=5120, host=2048"), "{text}");
    }

    #[test]
    fn references_are_written_down_between_two_marks() {
        let quiet = host(Execution::Counted, 1);
        let record = Boot { references: Some(Path::new("/d/references")), ..host(Execution::Counted, 1) };
        let text = |boot: &Boot| configuration(boot, Path::new("/d"), "/dev/pts/7");
        assert!(!text(&quiet).contains("magic_break") && debugger(&quiet) == "c\n");
        assert!(text(&record).contains("debugger_log: /d/references"), "{}", text(&record));
        let commands = debugger(&record);
        assert_eq!(commands.lines().filter(|line| *line == "trace-mem on").count(), RECORDS);
        assert!(commands.starts_with("c\ntrace-mem on\nc\ntrace-mem off\nc\n"), "{commands}");
    }

    #[test]
    fn a_host_with_more_processors_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let refused = machine(&host(Execution::Emulated, 2), directory.path()).expect_err("it has one");
        assert!(refused.to_string().contains("one processor, not 2"), "{refused}");
    }

    #[test]
    fn what_a_program_says_arrives_as_it_was_and_ends_with_the_machine() {
        let (mut ours, theirs, name) = terminal().expect("pseudo terminals can be made");
        let mut machine = File::options().write(true).open(name).expect("it opens");
        machine.write_all(b"a\nb\x03\x04").expect("somebody reads");
        drop((machine, theirs));
        let mut said = Vec::new();
        let end = ours.read_to_end(&mut said);
        assert_eq!((said.as_slice(), end.is_err()), (&b"a\nb\x03\x04"[..], true), "its other end is closed");
    }
}
