//! The guest's side: the first process of a Linux guest, which does the work between two rings.

use std::arch::asm;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::doorbell::{BOOTED, FLUSH, PORT};

/// The word for a guest that answers for ever.
pub const SESSIONS: &str = "sessions";
/// A program that only ends, for fork + exec.
const NOTHING: &str = "/nothing";
const PAGES: usize = 256;
const PAGE: usize = 4096;
/// Pages of the random access: 32 MiB.
const SCATTERED: usize = 8192;
/// How long a session thinks between two answers.
const THINK: Duration = Duration::from_millis(50);

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

/// A user's loop: `laps` times a store to each of 256 pages. The pages come in the first time.
fn user_loop(laps: u64) -> io::Result<()> {
    static DATA: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut data = DATA.lock().unwrap_or_else(PoisonError::into_inner);
    data.resize(PAGES * PAGE, 0);
    for lap in 0..laps as usize {
        for page in data.chunks_mut(PAGE) {
            page[lap % PAGE] = std::hint::black_box(lap as u8);
        }
    }
    std::hint::black_box(&data);
    Ok(())
}

/// Stores to `count` pages of 32 MiB drawn at random, the same each time. The pages come in the first time.
fn random_access(count: u64) -> io::Result<()> {
    static DATA: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut data = DATA.lock().unwrap_or_else(PoisonError::into_inner);
    data.resize(SCATTERED * PAGE, 0);
    // Knuth's generator: cheap, and scattered enough that no page is next to the one before.
    let mut state = 1_u64;
    for _ in 0..count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let page = (state >> 33) as usize % SCATTERED;
        if let Some(byte) = data.get_mut(page * PAGE) {
            *byte = byte.wrapping_add(1);
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

/// One kind of work: its name, how often it is done, how.
pub struct Work {
    /// Its name in tables.
    pub name: &'static str,
    /// Operations between the two rings.
    pub operations: u64,
    run: fn(u64) -> io::Result<()>,
}

/// All workloads, in the order in which they run.
pub const WORK: [Work; 6] = [
    Work { name: "fork", operations: 100, run: |n| (0..n).try_for_each(|_| fork()) },
    Work { name: "fork + exec", operations: 100, run: |n| (0..n).try_for_each(|_| fork_exec()) },
    Work {
        name: "mmap, touch 256 pages, munmap",
        operations: 50,
        run: |n| (0..n).try_for_each(|_| map_touch_unmap()),
    },
    Work { name: "pipe ping-pong", operations: 500, run: pipe },
    // Last: their pages would make every later fork dearer.
    Work { name: "user loop, a lap over 256 pages", operations: 20_000, run: user_loop },
    Work { name: "random access over 32 MiB", operations: 5_000_000, run: random_access },
];

/// The bells of a workload: before and after it.
pub const fn bells(number: u8) -> (u8, u8) {
    (2 * number + 1, 2 * number + 2)
}

/// A session's answer: half of it a program's own work, half of it the kernel's.
fn answer() -> io::Result<()> {
    (0..4).try_for_each(|_| fork_exec())?;
    (0..2).try_for_each(|_| map_touch_unmap())?;
    pipe(25)?;
    user_loop(1500)
}

/// Takes the doorbell's port for this process.
fn reach_the_bell() -> io::Result<()> {
    // SAFETY: gives this process the right to one port, behind which is the doorbell.
    os(unsafe { libc::ioperm(PORT.into(), 1, 1) }.into()).map(drop)
}

/// Rings. The VM stands still until the host has noted it.
fn ring(bell: u8) {
    // SAFETY: writes one byte to the port that `reach_the_bell` has taken; touches no memory.
    unsafe { asm!("out dx, al", in("dx") PORT, in("al") bell, options(nomem, nostack, preserves_flags)) };
}

/// The guest's first process: with the word [`SESSIONS`] answers for ever, else every workload in turn,
/// then power off. Comes back only where it can't.
///
/// # Errors
/// Where this is not a guest's first process, or there is no doorbell.
pub fn guest(words: &[String]) -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("this is for the first process of a Linux guest"));
    }
    reach_the_bell()?;
    ring(BOOTED);
    if words.iter().any(|word| word == SESSIONS) {
        ring(FLUSH);
        let (begin, end) = bells(0);
        loop {
            std::thread::sleep(THINK);
            ring(begin);
            answer()?;
            ring(end);
            ring(FLUSH);
        }
    }
    for (number, work) in (0..).zip(&WORK) {
        let (begin, end) = bells(number);
        // Once before it counts, for what the kernel does the first time.
        let result = (work.run)((work.operations / 10).max(1)).and_then(|()| {
            ring(begin);
            (work.run)(work.operations)?;
            ring(end);
            Ok(())
        });
        if let Err(error) = result {
            // The workloads go on where the console takes nothing.
            let _ = writeln!(io::stdout(), "ballast slat: {}: {error}", work.name);
        }
    }
    ring(FLUSH);
    // SAFETY: plain system calls; nothing is left to be written.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    Err(io::Error::last_os_error())
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
        let status = std::process::Command::new(&path).status().expect("it runs");
        assert!(status.success(), "{status}");
    }

    #[test]
    fn workloads_run_outside_a_guest_too() {
        for work in WORK {
            (work.run)(2).unwrap_or_else(|e| panic!("{}: {e}", work.name));
        }
    }
}
