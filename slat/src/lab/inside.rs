//! The first and only process of an emulated host: loads KVM, runs the plan,
//! sends the result over the second serial port, and switches the host off.

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::linux::density::density;
use crate::linux::{self, Guests};
use crate::payload::Setup;
use crate::payload::memory::Backing;
use crate::run::series::touched;
use crate::run::{Plan, Run, run};
use crate::walk::PageSize;

/// Where the archive keeps the modules, named so that they sort in the order of loading.
pub const MODULES: &str = "modules";
/// Where the result goes.
const RESULT: &str = "/dev/ttyS1";

/// What stands in a result that is sent before Linux guests have done their work.
const UNFINISHED: &str = "the Linux guests did not come to their end";

/// Huge pages of 2 MiB set aside at least. Part of what was counted: with another number all is counted anew.
const HUGE_PAGES: u64 = 16;

/// Huge pages of 2 MiB to set aside for a plan: what its largest payload over them takes.
fn huge_pages(setups: &[Setup]) -> u64 {
    let over = setups.iter().filter(|setup| setup.backing == Backing::Hugetlb2M);
    over.map(|setup| touched(setup).div_ceil(PageSize::Size2M.bytes())).fold(HUGE_PAGES, u64::max)
}

fn mount(kind: &CStr, at: &CStr) -> io::Result<()> {
    fs::create_dir_all(at.to_string_lossy().as_ref())?;
    // SAFETY: three terminated strings and no data.
    match unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn load(path: &std::path::Path, parameters: &str) -> io::Result<()> {
    let file = File::open(path)?;
    let parameters = CString::new(parameters)?;
    // SAFETY: an open file and a terminated string.
    match unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the first process of an emulated host does.
pub struct Job<P> {
    /// Makes the plan once the file systems are there.
    pub plan: P,
    /// SLAT on or off.
    pub nested_paging: bool,
    /// Whether KVM may use the MMU that it has for SLAT alone, or must use the one it has for shadow paging too.
    pub tdp_mmu: bool,
    /// What Linux guests do.
    pub guests: Guests,
}

/// A control group of this process's own, whose kernel memory is counted. Without one that figure is missing.
fn own_cgroup() -> io::Result<()> {
    mount(c"cgroup2", c"/sys/fs/cgroup")?;
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
    fs::create_dir("/sys/fs/cgroup/slat")?;
    fs::write("/sys/fs/cgroup/slat/cgroup.procs", "0")
}

fn load_all(nested_paging: bool, tdp_mmu: bool) -> io::Result<()> {
    let mut modules: Vec<_> =
        fs::read_dir(format!("/{MODULES}"))?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    modules.sort();
    for module in modules {
        let name = module.to_string_lossy();
        let parameters = match (name.contains("kvm-amd"), nested_paging) {
            (true, true) => "npt=1",
            (true, false) => "npt=0",
            _ if name.contains("kvm-intel") => {
                if nested_paging {
                    "ept=1"
                } else {
                    "ept=0"
                }
            }
            _ if name.ends_with("kvm.ko") && !tdp_mmu => "tdp_mmu=0",
            _ => "",
        };
        load(&module, parameters).map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
    }
    Ok(())
}

/// Sends a result as a line of JSON; the last whole line counts.
fn send(run: &Run) -> io::Result<()> {
    let mut port = OpenOptions::new().write(true).open(RESULT)?;
    // SAFETY: termios is plain data that tcgetattr fills in.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: an open terminal and our own structure; a line discipline that changed the text would spoil it.
    unsafe {
        libc::tcgetattr(port.as_raw_fd(), &raw mut termios);
        libc::cfmakeraw(&raw mut termios);
        libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &raw const termios);
    }
    let text = serde_json::to_string(run).map_err(io::Error::other)?;
    port.write_all(text.as_bytes())?;
    port.write_all(b"\n")?;
    // SAFETY: an open terminal; returns once the last byte has left.
    unsafe { libc::tcdrain(port.as_raw_fd()) };
    Ok(())
}

/// Does its job as the first process of an emulated host. Comes back only to say why it failed.
///
/// # Errors
/// Where this is not an emulated host's first process, KVM can't be loaded, or the result can't be sent.
pub fn main(job: Job<impl FnOnce() -> Plan>) -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("this is for the first process of an emulated host"));
    }
    let result = prepare_and_run(job);
    if let Err(error) = &result {
        eprintln!("ballast slat: {error}");
    }
    // The emulator was told to leave at a reset.
    // SAFETY: plain system calls; nothing is left to be written.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_AUTOBOOT);
    }
    result
}

fn prepare_and_run(job: Job<impl FnOnce() -> Plan>) -> io::Result<()> {
    for (kind, at) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        mount(kind, at).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", at.to_string_lossy())))?;
    }
    // Only figures are lost without these.
    let _ = mount(c"debugfs", c"/sys/kernel/debug");
    let _ = mount(c"tracefs", c"/sys/kernel/tracing");
    if let Err(error) = own_cgroup() {
        eprintln!("ballast slat: no control group: {error}");
    }
    load_all(job.nested_paging, job.tdp_mmu)?;
    let plan = (job.plan)();
    // Without them the payloads over huge pages say so themselves.
    let _ = fs::write("/proc/sys/vm/nr_hugepages", huge_pages(&plan.setups).to_string());
    // The first machine pays for things that the kernel does once.
    let warm = Plan {
        setups: plan.setups.iter().take(3).cloned().collect(),
        passes: 1,
        rounds: 1,
        limit: Duration::from_secs(60),
        clock: plan.clock,
        reasons: false,
    };
    let go_on = AtomicBool::new(false);
    run(&warm, &go_on, |_, _| {});
    let mut result = run(&plan, &go_on, |_, setup| eprintln!("{}", setup.describe()));
    if job.guests != Guests::None {
        // Should a guest never come to its end, whoever waits for this host has what came before.
        result.linux_failure = Some(UNFINISHED.into());
        send(&result)?;
    }
    let failure = match job.guests {
        Guests::None => None,
        Guests::Workloads => keep(linux::workloads(false), |found| result.linux = found),
        Guests::Reasons => keep(linux::workloads(true), |found| result.linux = found),
        Guests::Density => {
            let mut partial = result.clone();
            let found = density(|so_far| {
                partial.density = Some(so_far);
                if let Err(error) = send(&partial) {
                    eprintln!("ballast slat: {RESULT}: {error}");
                }
            });
            keep(found, |found| result.density = Some(found))
        }
    };
    result.linux_failure = failure;
    send(&result)
}

fn keep<T>(found: io::Result<T>, keep: impl FnOnce(T)) -> Option<String> {
    match found {
        Ok(found) => keep(found),
        Err(error) => return Some(error.to_string()),
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Extent, setups};
    use api::units::Bytes;

    #[test]
    fn huge_pages_are_enough_for_every_plan_and_as_ever_for_the_counted_one() {
        for extent in [Extent::Quick, Extent::Lab, Extent::Scaling, Extent::Memory, Extent::Full] {
            let all = setups(extent, Bytes::gib(5), 4);
            let pages = huge_pages(&all);
            let over = all.iter().filter(|setup| setup.backing == Backing::Hugetlb2M);
            assert!(over.clone().all(|setup| setup.data.0 <= pages * (2 << 20)), "{extent:?}: {pages}");
            let counted = extent != Extent::Full;
            assert_eq!(pages == HUGE_PAGES, counted, "{extent:?}: {pages}");
        }
    }
}
