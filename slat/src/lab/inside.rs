//! What runs in a host of the lab: the plan, whose result is handed out.

use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::RESULT;
use crate::linux::density::density;
use crate::linux::{self, Guests};
use crate::payload::memory::Backing;
use crate::payload::{Payload, Setup};
use crate::run::series::touched;
use crate::run::{Plan, Run, run};
use crate::walk::PageSize;

/// What stands in a result that is sent before Linux guests have done their work.
const UNFINISHED: &str = "the Linux guests did not come to their end";

/// Huge pages of 2 MiB set aside at least. Part of what was counted: with another number all is counted anew.
const HUGE_PAGES: u64 = 16;

/// Huge pages of 2 MiB to set aside for a plan: what its largest payload over them takes.
fn huge_pages(setups: &[Setup]) -> u64 {
    let over = setups.iter().filter(|setup| setup.backing == Backing::Hugetlb2M);
    over.map(|setup| touched(setup).div_ceil(PageSize::Size2M.bytes())).fold(HUGE_PAGES, u64::max)
}

/// What a host of the lab does.
pub struct Job<P> {
    /// Makes the plan once the file systems are there.
    pub plan: P,
    /// What Linux guests do.
    pub guests: Guests,
}

/// A control group of this process's own, whose kernel memory is counted. Without one that figure is missing.
fn own_cgroup() -> io::Result<()> {
    lab_init::system::mount("cgroup2", "/sys/fs/cgroup")?;
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
    fs::create_dir("/sys/fs/cgroup/slat")?;
    fs::write("/sys/fs/cgroup/slat/cgroup.procs", "0")
}

/// Hands a result out; the last one counts.
fn send(run: &Run) -> io::Result<()> {
    lab::hand_out(RESULT, serde_json::to_string(run)?.as_bytes())
}

/// Does what the host is there for. As the host's first process it has another of the same program do it, and
/// never comes back.
///
/// # Errors
/// Where this is no emulated host, or the result can't be handed out.
pub fn main(job: Job<impl FnOnce() -> Plan>) -> io::Result<()> {
    if std::process::id() == 1 {
        lab_init::host::main();
    }
    if !lab::inside() {
        return Err(io::Error::other("this is for emulated hosts"));
    }
    if let Err(error) = own_cgroup() {
        say(format_args!("no control group: {error}"));
    }
    let plan = (job.plan)();
    // Without them the payloads over huge pages say so themselves.
    let _ = fs::write("/proc/sys/vm/nr_hugepages", huge_pages(&plan.setups).to_string());
    // The first machine pays for things that the kernel does once. A miss has no price here.
    let priced = plan.setups.iter().filter(|setup| setup.payload != Payload::Miss);
    let warm = Plan {
        setups: priced.take(3).cloned().collect(),
        passes: 1,
        rounds: 1,
        limit: Duration::from_secs(60),
        clock: plan.clock,
        reasons: false,
    };
    let go_on = AtomicBool::new(false);
    run(&warm, &go_on, |_, _| {});
    let mut result = run(&plan, &go_on, |_, setup| say(setup.describe()));
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
                    say(format_args!("no result was handed out: {error}"));
                }
            });
            keep(found, |found| result.density = Some(found))
        }
    };
    result.linux_failure = failure;
    send(&result)
}

/// Says how far it is, which ends nothing where that can't be written.
fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "ballast slat: {text}");
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
