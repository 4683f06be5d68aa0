//! The kernel's word about a VMM's process, whatever the VMM itself says.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use api::units::Bytes;
use rustix::io::Errno;
use rustix::param::clock_ticks_per_second;

/// Where Linux shows processes.
pub const PROCESSES: &str = "/proc";

/// What the host holds for a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResidentMemory {
    /// Anonymous, shared and file pages.
    pub ordinary: Bytes,
    /// Reserved huge pages (hugetlb), which are a pool of their own.
    pub reserved: Bytes,
}

impl ResidentMemory {
    /// All of it.
    pub fn all(self) -> Bytes {
        self.ordinary.saturating_add(self.reserved)
    }
}

/// What the host holds for the process, read in `processes`, which is [`PROCESSES`] outside tests. `None` if
/// there is no such process, or this one may not see it.
///
/// From `PID/status`, whose counters the kernel keeps anyway. Adding up the mappings would take the process's
/// mmap lock and a walk of its page tables.
pub fn resident_memory(processes: &Path, pid: u32) -> Option<ResidentMemory> {
    resident_memory_in(&fs::read_to_string(processes.join(format!("{pid}/status"))).ok()?)
}

fn resident_memory_in(status: &str) -> Option<ResidentMemory> {
    let reserved = field(status, "HugetlbPages").unwrap_or_default();
    Some(ResidentMemory { ordinary: field(status, "VmRSS")?, reserved })
}

/// The host's memory that is the process's own: not free while it runs, and not to be had by dropping caches.
/// Reserved huge pages don't count, as the kernel never counts them as available.
///
/// From `/proc/PID/status`, as [`resident_memory`].
pub fn own(pid: u32) -> Option<Bytes> {
    own_in(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn own_in(status: &str) -> Option<Bytes> {
    let fields = [field(status, "RssAnon")?, field(status, "RssShmem")?, field(status, "VmPTE")?];
    Some(fields.into_iter().sum())
}

fn field(status: &str, name: &str) -> Option<Bytes> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix(" kB")?.parse().ok().map(Bytes::kib)
}

/// What the host holds for the process outside its large mappings, which are guest memory.
///
/// From `/proc/PID/smaps`, which takes a while for a large guest: not for every tick.
pub fn vmm_own(pid: u32, guest_mapping: Bytes) -> Option<Bytes> {
    Some(vmm_own_in(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?, guest_mapping))
}

fn vmm_own_in(smaps: &str, guest_mapping: Bytes) -> Bytes {
    let mut sum = Bytes::ZERO;
    let mut guest = false;
    for line in smaps.lines() {
        let Some((field, value)) = line.split_once(':') else { continue };
        let Some(kib) = value.trim().strip_suffix(" kB").and_then(|kib| kib.parse().ok()) else { continue };
        match field {
            "Size" => guest = Bytes::kib(kib) >= guest_mapping,
            "Rss" if !guest => sum = sum.saturating_add(Bytes::kib(kib)),
            _ => {}
        }
    }
    sum
}

/// How long the process has run.
pub fn age(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    age_in(&stat, &uptime, clock_ticks_per_second())
}

/// When the process started, in clock ticks since boot: no other process has the same number and start.
/// `None` if no process has that number, or only a zombie.
///
/// # Errors
/// The kernel does not say.
pub fn started(pid: u32) -> io::Result<Option<u64>> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) if is_zombie(&stat) => Ok(None),
        Ok(stat) => started_in(&stat).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        // The second one, if the process ends while it is read.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The fields of proc_pid_stat(5) from the third on. They are counted behind the last closing bracket, as the
/// name in the second field may contain anything.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, behind_name)| behind_name).split_whitespace()
}

/// Field 3: it has ended, and its parent has not waited for it yet.
fn is_zombie(stat: &str) -> bool {
    fields(stat).next().is_some_and(|state| state.starts_with(['Z', 'X']))
}

/// Field 22 is the start in clock ticks since boot.
fn started_in(stat: &str) -> Option<u64> {
    fields(stat).nth(19)?.parse().ok()
}

fn age_in(stat: &str, uptime: &str, ticks_per_second: u64) -> Option<Duration> {
    let started = Duration::from_millis(started_in(stat)?.checked_mul(1000)?.checked_div(ticks_per_second)?);
    let now = Duration::try_from_secs_f64(uptime.split_whitespace().next()?.parse().ok()?).ok()?;
    Some(now.saturating_sub(started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_resident_counts() {
        let status = "Name:\tqemu\nVmHWM:\t  9000 kB\nVmRSS:\t  5000 kB\nRssAnon:\t 4000 kB\nHugetlbPages:\t 2048 kB\n";
        let held = resident_memory_in(status).unwrap();
        assert_eq!(held, ResidentMemory { ordinary: Bytes::kib(5000), reserved: Bytes::kib(2048) });
        assert_eq!(held.all(), Bytes::kib(7048));
        assert_eq!(resident_memory_in("Name:\tkthreadd\n"), None);
        let own = resident_memory(Path::new(PROCESSES), std::process::id()).unwrap().all();
        assert!(own > Bytes::mib(1) && own < Bytes::gib(4), "{own}");
    }

    #[test]
    fn caches_are_not_a_processs_own() {
        let status = "VmRSS:\t 900 kB\nRssAnon:\t 400 kB\nRssFile:\t 300 kB\nRssShmem:\t 200 kB\nVmPTE:\t 16 kB\n\
                      HugetlbPages:\t 2048 kB\n";
        assert_eq!(own_in(status), Some(Bytes::kib(616)));
        assert_eq!(own_in("Name:\tkthreadd\n"), None);
    }

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = "\
7f00-7f10 rw-p 00000000 00:00 0 \nSize: 262144 kB\nRss:  1024 kB\nPrivate_Hugetlb: 2048 kB\n\
7f20-7f21 rw-p 00000000 00:00 0 [heap]\nSize: 132 kB\nRss:  64 kB\nPss: 60 kB\n";
        assert_eq!(vmm_own_in(smaps, Bytes::mib(256)), Bytes::kib(64));
        assert!(vmm_own(std::process::id(), Bytes::gib(1024)).unwrap() > Bytes::mib(1));
    }

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let rest = (3..=21).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let stat = format!("7 (a) b (c) {rest} 1000 0 0");
        assert_eq!(age_in(&stat, "35.50 1.00\n", 100), Some(Duration::from_millis(25_500)));
        assert!(age(std::process::id()).unwrap() < Duration::from_secs(3600));
    }
}
