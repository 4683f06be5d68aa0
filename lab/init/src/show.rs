//! Says where things are in a guest, for tests that look at them from outside or compare guests.
//!
//! ```text
//! KERNEL physical=0xPHYSICAL link=0xVIRTUAL memory=0xVIRTUAL
//! ```
//! The kernel's code begins at the first (`/proc/iomem`) and the second (`/proc/kallsyms`); all memory is mapped
//! from the third on (`/proc/kcore`).
//!
//! ```text
//! SHOWN address=0xVIRTUAL physical=0xPHYSICAL value=0xWORD kernel=0xPHYSICAL
//! ```
//! The first physical address is what the kernel's page map says of the word
//! at that virtual address, the last where its code begins (`/proc/iomem`).
//! A thread keeps this process on the processor afterwards, so that its page
//! tables stay in use.

use std::fs::{self, File};
use std::hint;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;

const PAGE: u64 = 4096;
/// A page frame's number in an entry of `/proc/self/pagemap`.
const FRAME: u64 = (1 << 55) - 1;
const VALUE: u64 = 0x6261_6c6c_6173_7421;

/// Says it.
///
/// # Errors
/// Where the kernel does not tell.
pub fn show() -> io::Result<()> {
    // Stays for good: it must be there for as long as somebody may look.
    let shown: &'static u64 = Box::leak(Box::new(VALUE));
    let address = hint::black_box(shown) as *const u64 as u64;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE * 8)?;
    let physical = (u64::from_le_bytes(entry) & FRAME) * PAGE + address % PAGE;
    let kernel = kernel_code(&fs::read_to_string("/proc/iomem")?)
        .ok_or_else(|| io::Error::other("/proc/iomem names no kernel code"))?;
    println!("SHOWN address={address:#x} physical={physical:#x} value={shown:#x} kernel={kernel:#x}");
    thread::spawn(|| {
        loop {
            hint::spin_loop();
        }
    });
    Ok(())
}

/// The line that says where the kernel is.
///
/// # Errors
/// Where the kernel does not tell.
pub fn kernel() -> io::Result<String> {
    let missing = |what| io::Error::other(format!("{what} does not tell"));
    let physical = kernel_code(&fs::read_to_string("/proc/iomem")?).ok_or_else(|| missing("/proc/iomem"))?;
    let link =
        symbol(&fs::read_to_string("/proc/kallsyms")?, "_text").ok_or_else(|| missing("/proc/kallsyms"))?;
    let mut head = vec![0; PAGE as usize];
    let length = File::open("/proc/kcore")?.read_at(&mut head, 0)?;
    head.truncate(length);
    let memory = direct_map(&head).ok_or_else(|| missing("/proc/kcore"))?;
    Ok(format!("KERNEL physical={physical:#x} link={link:#x} memory={memory:#x}"))
}

fn symbol(symbols: &str, name: &str) -> Option<u64> {
    let words = symbols.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = words.into_iter().find(|words| words.get(2) == Some(&name))?;
    u64::from_str_radix(line.first()?, 16).ok()
}

/// Where physical address 0 is mapped: of the core's segments of memory each has both its addresses, other ones have
/// none or lie where the kernel's code does (fs/proc/kcore.c).
fn direct_map(core: &[u8]) -> Option<u64> {
    const CODE: u64 = 0xffff_ffff_8000_0000;
    let number = |at: usize| core.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let count = usize::from(u16::from_le_bytes(core.get(56..58)?.try_into().ok()?));
    let headers = (0..count).map(|index| 64 + index * 56);
    let addresses = headers.filter_map(|at| Some((number(at + 16)?, number(at + 24)?)));
    let memory =
        addresses.filter(|&(mapped, physical)| physical != u64::MAX && physical != 0 && mapped < CODE);
    memory.map(|(mapped, physical)| mapped.wrapping_sub(physical)).next()
}

fn kernel_code(iomem: &str) -> Option<u64> {
    let line = iomem.lines().find(|line| line.trim_end().ends_with(": Kernel code"))?;
    u64::from_str_radix(line.trim().split_once('-')?.0, 16).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn symbols_and_maps_are_found() {
        let symbols = "0000000000000000 A fixed_percpu_data\nffffffff9a000000 T _text\n";
        assert_eq!(super::symbol(symbols, "_text"), Some(0xffff_ffff_9a00_0000));
        assert_eq!(super::symbol(symbols, "_end"), None);
        let mut core = vec![0; 64 + 3 * 56];
        core[56] = 3;
        for (index, (mapped, physical)) in [
            (0xffff_ffff_9a00_0000, 0x200_0000),
            (0xffff_b000_0000_0000, u64::MAX),
            (0xffff_9100_0000_1000_u64, 0x1000),
        ]
        .into_iter()
        .enumerate()
        {
            let at = 64 + index * 56 + 16;
            core[at..at + 8].copy_from_slice(&u64::to_le_bytes(mapped));
            core[at + 8..at + 16].copy_from_slice(&u64::to_le_bytes(physical));
        }
        assert_eq!(super::direct_map(&core), Some(0xffff_9100_0000_0000));
        assert_eq!(super::direct_map(&core[..100]), None);
    }

    #[test]
    fn kernel_code_is_found() {
        let iomem = "00100000-0fffffff : System RAM\n  01000000-01e00dd0 : Kernel code\n";
        assert_eq!(super::kernel_code(iomem), Some(0x100_0000));
        assert_eq!(super::kernel_code("x"), None);
    }
}
