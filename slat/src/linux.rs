//! Workloads of a stock Linux guest: booted by `ballast run` in an emulated
//! host, with this same program as the guest's first process.
//!
//! Guest and host take turns through the console: the guest names what it is
//! about to do and waits for a line, so that the host can read KVM's counters
//! while nothing runs. Ticks are the guest's own time-stamp counter; it starts
//! at zero with the virtual CPU and in the deterministic lab counts the
//! instructions of everything, the hypervisor's too.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::payload::native::ticks;

/// Where an emulated host keeps the guest's kernel and initramfs.
pub const KERNEL: &str = "/guest/vmlinuz";
/// See [`KERNEL`].
pub const INITRD: &str = "/guest/initrd";
/// A program that only ends, for fork + exec.
const NOTHING: &str = "/nothing";
/// In front of each of the guest's lines.
const MARK: &str = "ballast-slat";
const MEMORY: &str = "192M";
const PAGES: usize = 256;
const PAGE: usize = 4096;

/// One workload's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// `boot`, `fork`, ...
    pub name: String,
    /// How often it was done.
    pub operations: u64,
    /// Ticks for each.
    pub ticks: f64,
    /// VM exits for each, less port I/O and the host's interrupts; `None` for the boot, or where the
    /// host gives no counters.
    pub exits: Option<f64>,
}

/// A static ELF of one instruction sequence: `mov edi, 0; mov eax, 60; syscall` (`exit(0)`).
fn nothing() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let start = 0x40_0000_u64;
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    elf.extend((start + 120).to_le_bytes()); // entry: behind both headers
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend([0; 12]); // no section headers, no flags
    elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // one program header
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // load, readable and executable
    let code = [0xbf, 0, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    let size = 120 + code.len() as u64;
    for field in [0, start, start, size, size, 0x1000] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

fn os(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A child that does `what` and ends; waits for it.
fn child(what: impl FnOnce()) -> io::Result<()> {
    // SAFETY: this process has one thread, so the child may do anything.
    match os(unsafe { libc::fork() }.into())? {
        0 => {
            what();
            // SAFETY: ends the child without running the parent's handlers.
            unsafe { libc::_exit(0) }
        }
        pid => {
            // SAFETY: our own child; its status is not wanted.
            os(unsafe { libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0) }.into()).map(drop)
        }
    }
}

fn fork() -> io::Result<()> {
    child(|| {})
}

fn fork_exec() -> io::Result<()> {
    child(|| {
        let path = c"/nothing";
        let arguments = [path.as_ptr(), std::ptr::null()];
        // SAFETY: a terminated path and a terminated array.
        unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) };
    })
}

/// Maps some pages, stores to each, unmaps them.
fn map_touch_unmap() -> io::Result<()> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, used only here and unmapped at the end.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), PAGES * PAGE, prot, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        for page in 0..PAGES {
            start.cast::<u8>().add(page * PAGE).write_volatile(1);
        }
        os(libc::munmap(start, PAGES * PAGE).into()).map(drop)
    }
}

/// A user's loop: stores to pages it has, a thousand times over. The pages come in the first time.
fn user_loop() -> io::Result<()> {
    static DATA: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut data = DATA.lock().unwrap_or_else(PoisonError::into_inner);
    data.resize(PAGES * PAGE, 0);
    for lap in 0..1000_usize {
        for page in data.chunks_mut(PAGE) {
            page[lap % PAGE] = std::hint::black_box(lap as u8);
        }
    }
    std::hint::black_box(&data);
    Ok(())
}

/// A byte to another process and back, `count` times.
fn pipe(count: u64) -> io::Result<()> {
    let (mut there_out, mut there_in) = io::pipe()?;
    let (mut back_out, mut back_in) = io::pipe()?;
    let mut byte = [0];
    // SAFETY: one thread, as above.
    if os(unsafe { libc::fork() }.into())? == 0 {
        drop((there_in, back_out));
        while io::Read::read(&mut there_out, &mut byte).is_ok_and(|n| n == 1)
            && back_in.write_all(&byte).is_ok()
        {}
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) }
    }
    drop((there_out, back_in));
    for _ in 0..count {
        there_in.write_all(&byte)?;
        io::Read::read_exact(&mut back_out, &mut byte)?;
    }
    Ok(())
}

/// Says `line` on the console and waits for the host's answer.
fn turn(line: &str) -> io::Result<()> {
    println!("{MARK} {line}");
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map(drop)
}

type Work = (&'static str, u64, fn(u64) -> io::Result<()>);

const WORK: [Work; 5] = [
    ("fork", 100, |n| (0..n).try_for_each(|_| fork())),
    ("fork + exec", 100, |n| (0..n).try_for_each(|_| fork_exec())),
    ("mmap, touch 256 pages, munmap", 50, |n| (0..n).try_for_each(|_| map_touch_unmap())),
    ("pipe ping-pong", 500, pipe),
    // Last: its pages would make every later fork dearer.
    ("user loop", 1, |_| user_loop()),
];

/// The guest's first process: every workload in turn, then power off. Comes back only where it can't.
///
/// # Errors
/// Where this is not a guest's first process.
pub fn guest() -> io::Result<()> {
    let booted = ticks();
    if std::process::id() != 1 {
        return Err(io::Error::other("this is for the first process of a Linux guest"));
    }
    println!("{MARK} result boot {booted}");
    for (name, operations, work) in WORK {
        // Once before it counts, for what the kernel does the first time.
        let result = work((operations / 10).max(1)).and_then(|()| {
            turn("begin")?;
            let begin = ticks();
            work(operations)?;
            let taken = ticks().saturating_sub(begin);
            turn("end")?;
            Ok(taken)
        });
        match result {
            Ok(taken) => println!("{MARK} result {name} {taken}"),
            Err(error) => println!("{MARK} failed {name}: {error}"),
        }
    }
    // SAFETY: plain system calls; nothing is left to be written.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    Err(io::Error::last_os_error())
}

/// KVM's counters of all machines, from debugfs: exits less port I/O and the host's interrupts.
fn exits() -> Option<u64> {
    let read = |name: &str| -> Option<u64> {
        fs::read_to_string(Path::new("/sys/kernel/debug/kvm").join(name)).ok()?.trim().parse().ok()
    };
    Some(read("exits")?.saturating_sub(read("io_exits")?).saturating_sub(read("irq_exits")?))
}

/// Boots the guest and takes turns with it; `None` where this host has no guest's kernel.
///
/// # Errors
/// Where the guest does not come to its end.
pub fn host() -> io::Result<Option<Vec<Workload>>> {
    if !Path::new(KERNEL).exists() {
        return Ok(None);
    }
    let line =
        "console=ttyS0 quiet panic=-1 norandmaps random.trust_cpu=off rdinit=/ballast -- slat guest nokaslr";
    let mut vm = Command::new("/ballast")
        .args([
            "run",
            "--kernel",
            KERNEL,
            "--initrd",
            INITRD,
            "--memory",
            MEMORY,
            "--no-api",
            "--cmdline",
            line,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (Some(mut input), Some(output)) = (vm.stdin.take(), vm.stdout.take()) else {
        return Err(io::Error::other("no pipes to the guest's console"));
    };
    let mut workloads = Vec::new();
    let (mut begin, mut counted) = (None, None);
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let Some((_, said)) = line.trim().split_once(&format!("{MARK} ")) else { continue };
        if said == "begin" {
            begin = exits();
            input.write_all(b"\n")?;
        } else if said == "end" {
            counted = begin.and_then(|b| Some(exits()?.saturating_sub(b)));
            input.write_all(b"\n")?;
        } else if let Some(workload) = said.strip_prefix("result ").and_then(|r| parse(r, counted.take())) {
            workloads.push(workload);
        } else {
            eprintln!("{said}");
        }
    }
    let status = vm.wait()?;
    if workloads.len() < WORK.len() + 1 {
        let got = workloads.len();
        return Err(io::Error::other(format!("the Linux guest ended ({status}) after {got} workloads")));
    }
    Ok(Some(workloads))
}

fn parse(result: &str, exits: Option<u64>) -> Option<Workload> {
    let (name, ticks) = result.rsplit_once(' ')?;
    let ticks: u64 = ticks.parse().ok()?;
    let operations = WORK.iter().find(|w| w.0 == name).map_or(1, |w| w.1);
    let each = |n: u64| n as f64 / operations as f64;
    Some(Workload { name: name.into(), operations, ticks: each(ticks), exits: exits.map(each) })
}

/// The guest's initramfs holds a program that only ends: path and contents.
pub fn program() -> (&'static str, Vec<u8>) {
    (NOTHING.trim_start_matches('/'), nothing())
}

/// Writes that program to `path`, to be run.
///
/// # Errors
/// The file system's.
pub fn write_program(path: &Path) -> io::Result<()> {
    fs::write(path, nothing())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_that_only_ends_does() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("nothing");
        write_program(&path).expect("written");
        let status = Command::new(&path).status().expect("it runs");
        assert!(status.success(), "{status}");
    }

    #[test]
    fn workloads_run_outside_a_guest_too() {
        for (name, _, work) in WORK {
            work(2).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn results_are_read_and_nonsense_is_not() {
        let found = parse("fork + exec 2000", Some(300)).expect("a result");
        assert_eq!((found.name.as_str(), found.ticks, found.exits), ("fork + exec", 20.0, Some(3.0)));
        assert_eq!(parse("boot 7", None).map(|w| w.ticks), Some(7.0));
        assert_eq!(parse("fork x", None), None);
        assert_eq!(parse("fork", None), None);
    }
}
