//! The kernel that takes over when the guest's own has crashed (kexec_file_load(2)).

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// `KEXEC_FILE_ON_CRASH` (linux/kexec.h): into the memory that `crashkernel=` keeps.
const ON_CRASH: libc::c_ulong = 2;

/// Loads the kernel and the initramfs that lie on two disks. It starts with this kernel's own command line, but for
/// the memory that is kept for a third one.
pub fn load(kernel: &str, initrd: &str) -> Result<(), String> {
    let kernel = file(kernel)?;
    let initrd = file(initrd)?;
    let own = fs::read_to_string("/proc/cmdline").map_err(|error| format!("/proc/cmdline: {error}"))?;
    let words = own.split_whitespace().filter(|word| !word.starts_with("crashkernel="));
    let cmdline: Vec<&str> = words.chain(["reset_devices", "nr_cpus=1"]).collect();
    let cmdline = CString::new(cmdline.join(" ")).map_err(|error| error.to_string())?;
    // SAFETY: the kernel reads a string of that length, with its end, and two open files.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            cmdline.as_bytes_with_nul().len(),
            cmdline.as_ptr(),
            ON_CRASH,
        )
    };
    if loaded == 0 {
        Ok(())
    } else {
        Err(format!("no kernel is loaded for a crash: {}", io::Error::last_os_error()))
    }
}

/// What lies on a disk, as a regular file: the system call takes no other.
fn file(disk: &str) -> Result<File, String> {
    let (from, to) = (format!("/dev/{disk}"), format!("/tmp/{disk}"));
    let failed = |error: io::Error| format!("{from}: {error}");
    let mut source = File::open(&from).map_err(failed)?;
    let mut copy = File::create(&to).map_err(failed)?;
    io::copy(&mut source, &mut copy).map_err(failed)?;
    let file = File::open(&to).map_err(failed)?;
    fs::remove_file(&to).map_err(failed)?;
    Ok(file)
}
