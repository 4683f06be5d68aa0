//! How the guest's cgroups stand (Documentation/admin-guide/cgroup-v2.rst, "Memory").

use std::fs;
use std::path::Path;

use crate::pressure::stall_total;
use crate::source::{Source, counter};

const ROOT: &str = "/sys/fs/cgroup";
/// Levels below the root: slices, then services and users.
const DEPTH: usize = 2;
/// Groups that are looked at; a guest may have thousands.
const MOST_GROUPS: usize = 256;

/// All groups together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Microseconds that the one which waited most has waited for memory.
    pub most_stalled_us: u64,
    /// How often groups of the first level, or any below them, came to a limit of their own.
    pub limited: u64,
}

/// Looks at them all; `None` where the guest has no cgroup v2 with memory accounting.
pub fn look() -> Option<Cgroups> {
    look_below(Path::new(ROOT))
}

fn look_below(root: &Path) -> Option<Cgroups> {
    let mut walk = Walk { left: MOST_GROUPS, found: None };
    walk.enter(root, DEPTH);
    walk.found
}

struct Walk {
    left: usize,
    found: Option<Cgroups>,
}

impl Walk {
    fn enter(&mut self, directory: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let Some(left) = self.left.checked_sub(1) else { return };
            self.left = left;
            self.group(&entry.path(), depth);
        }
    }

    fn group(&mut self, group: &Path, depth: usize) {
        let stalled = Source::open(group.join("memory.pressure")).read(|text| stall_total(text, "some"));
        if let Some(stalled) = stalled.flatten() {
            let found = self.found.get_or_insert_default();
            found.most_stalled_us = found.most_stalled_us.max(stalled);
        }
        if depth == DEPTH {
            // Those of the first level count for all below them.
            let limited = Source::open(group.join("memory.events")).read(|text| {
                let (high, max) = (counter(text, "high"), counter(text, "max"));
                high.unwrap_or(0).saturating_add(max.unwrap_or(0))
            });
            if let Some(limited) = limited {
                let found = self.found.get_or_insert_default();
                found.limited = found.limited.saturating_add(limited);
            }
        }
        if let Some(depth) = depth.checked_sub(1).filter(|depth| *depth > 0) {
            self.enter(group, depth);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_stalled_group_is_found_and_limits_are_counted_once() {
        let root = tempfile::tempdir().unwrap();
        let group = |name: &str, stalled: u64, limited: u64| {
            let path = root.path().join(name);
            fs::create_dir_all(&path).unwrap();
            let pressure = format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={stalled}\n");
            fs::write(path.join("memory.pressure"), pressure).unwrap();
            fs::write(path.join("memory.events"), format!("low 7\nhigh {limited}\nmax 1\noom 0\n")).unwrap();
        };
        assert_eq!(look_below(root.path()), None);
        group("system.slice", 100, 2);
        group("system.slice/db.service", 900, 2);
        group("system.slice/db.service/too-deep", 5000, 9);
        group("user.slice", 50, 0);
        assert_eq!(look_below(root.path()), Some(Cgroups { most_stalled_us: 900, limited: 4 }));
    }

    #[test]
    fn thousands_of_groups_cost_no_more_than_some_hundred() {
        let root = tempfile::tempdir().unwrap();
        for number in 0..MOST_GROUPS + 100 {
            fs::create_dir(root.path().join(number.to_string())).unwrap();
        }
        let mut walk = Walk { left: MOST_GROUPS, found: None };
        walk.enter(root.path(), DEPTH);
        assert_eq!((walk.left, walk.found), (0, None));
    }
}
