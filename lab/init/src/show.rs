//! Says where a page of this process is, for tests that look at it from outside.
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

fn kernel_code(iomem: &str) -> Option<u64> {
    let line = iomem.lines().find(|line| line.trim_end().ends_with(": Kernel code"))?;
    u64::from_str_radix(line.trim().split_once('-')?.0, 16).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn kernel_code_is_found() {
        let iomem = "00100000-0fffffff : System RAM\n  01000000-01e00dd0 : Kernel code\n";
        assert_eq!(super::kernel_code(iomem), Some(0x100_0000));
        assert_eq!(super::kernel_code("x"), None);
    }
}
