//! The memory limits of the control groups that VMs live in.
//!
//! VMs are started beside the daemon, in its slice or its container: a limit of that limits all of them
//! together. A `.service` that holds nobody but the daemon is left out, so that its own `MemoryMax` is not
//! taken for theirs. A VM may have groups of its own as well, whose limits are for it alone.
//!
//! Version 2 (Documentation/admin-guide/cgroup-v2.rst: memory.max, memory.high,
//! memory.current, memory.stat) and version 1 (cgroup-v1/memory.rst).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use api::units::Bytes;

use super::available::Parts;

/// The part of a limit that is left for page tables and the VMMs themselves, in percent.
const MARGIN_PERCENT: u64 = 3;

/// What a control group leaves to the VMs in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupMemory {
    /// What all in it may have together, less a margin.
    pub limit: Bytes,
    /// What of this can be had: see [`super::available`].
    pub free: Bytes,
}

/// Which files describe a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The groups that may have a limit, from the innermost outwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups(Vec<(Version, PathBuf)>);

impl Groups {
    /// Those that limit the VMs beside a daemon whose `/proc/PID/cgroup` is `file`, in a hierarchy mounted at
    /// `root`.
    ///
    /// Without control groups, or without a memory controller, there are none.
    pub fn beside(file: &Path, root: &Path) -> Self {
        let innermost = |path: &Path| path.extension().is_some_and(|kind| kind == "service");
        let text = fs::read_to_string(file).unwrap_or_default();
        Self::find(&text, root, |path| usize::from(innermost(path)))
    }

    /// Those that limit the very process whose `/proc/PID/cgroup` is `file`.
    pub fn of(file: &Path, root: &Path) -> Self {
        Self::find(&fs::read_to_string(file).unwrap_or_default(), root, |_| 0)
    }

    /// What [`of`](Self::of) and [`limit`](Self::limit) say of a process.
    ///
    /// # Errors
    /// A file is there and can't be read now: whether there is a limit is not known.
    pub fn limit_of(file: &Path, root: &Path) -> io::Result<Option<Bytes>> {
        let groups = Self::find(&fs::read_to_string(file)?, root, |_| 0);
        let limits = groups.0.iter().map(|(version, group)| version.read_limit(group));
        limits.filter_map(Result::transpose).reduce(|a, b| Ok(a?.min(b?))).transpose()
    }

    fn find(text: &str, root: &Path, skipped: impl Fn(&Path) -> usize) -> Self {
        let mut groups = Vec::new();
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let (version, mount) = if controllers.is_empty() {
                (Version::Two, root.to_owned())
            } else if controllers.split(',').any(|controller| controller == "memory") {
                (Version::One, root.join("memory"))
            } else {
                continue;
            };
            // A path that leads out of the mount is of another namespace.
            let path = Path::new(path.trim_start_matches('/'));
            if path.components().any(|part| part == std::path::Component::ParentDir) {
                continue;
            }
            groups.extend(path.ancestors().skip(skipped(path)).map(|path| (version, mount.join(path))));
        }
        Self(groups)
    }

    /// The tightest limit, less a margin; `None` where none has a limit.
    pub fn limit(&self) -> Option<Bytes> {
        self.0.iter().filter_map(|(version, group)| version.limit(group)).min()
    }

    /// What the tightest of them leaves; `None` where none has a limit.
    ///
    /// # Errors
    /// A file is there and can't be read now: whether there is a limit is not known.
    pub fn memory(&self) -> io::Result<Option<GroupMemory>> {
        let limited = self.0.iter().filter_map(|(version, group)| version.memory(group).transpose());
        // The limit and what is free may be tightest in different groups.
        let both = |a: GroupMemory, b: GroupMemory| GroupMemory {
            limit: a.limit.min(b.limit),
            free: a.free.min(b.free),
        };
        limited.reduce(|a, b| Ok(both(a?, b?))).transpose()
    }
}

impl Version {
    /// What all in `group` may have together, less a margin.
    fn limit(self, group: &Path) -> Option<Bytes> {
        self.read_limit(group).unwrap_or(None)
    }

    /// The same.
    ///
    /// # Errors
    /// A file is there and can't be read.
    fn read_limit(self, group: &Path) -> io::Result<Option<Bytes>> {
        let limit = match self {
            // `max` is no number and no limit.
            Self::Two => {
                let [most, high] = ["memory.max", "memory.high"].map(|file| read_number(&group.join(file)));
                most?.into_iter().chain(high?).min()
            }
            // The largest number of pages, in bytes, is how version 1 says that there is none.
            Self::One => {
                let none = (i64::MAX as u64) & !0xfff;
                read_number(&group.join("memory.limit_in_bytes"))?.filter(|limit| *limit < none)
            }
        };
        Ok(limit.map(|limit| Bytes(limit).saturating_sub(Bytes(limit).percent(MARGIN_PERCENT))))
    }

    /// What a group leaves, if it has a limit.
    ///
    /// # Errors
    /// A file is there and can't be read.
    fn memory(self, group: &Path) -> io::Result<Option<GroupMemory>> {
        let Some(limit) = self.read_limit(group)? else { return Ok(None) };
        let used = match self {
            Self::Two => read_number(&group.join("memory.current")),
            Self::One => read_number(&group.join("memory.usage_in_bytes")),
        };
        let Some(used) = used? else { return Ok(None) };
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let sum = |fields: &[&str]| -> Bytes {
            fields.iter().map(|field| Bytes(value(&stat, field).unwrap_or(0))).sum()
        };
        let (page_cache, slabs) = match self {
            Self::Two => (sum(&["active_file", "inactive_file"]), sum(&["slab_reclaimable"])),
            // It does not tell of slabs.
            Self::One => (sum(&["total_active_file", "total_inactive_file"]), Bytes::ZERO),
        };
        let used = Bytes(used);
        let parts = Parts { free: limit.saturating_sub(used), page_cache, slabs };
        // A group that is beyond its limit, less the margin, gives that back first.
        let beyond = used.saturating_sub(limit);
        Ok(Some(GroupMemory { limit, free: parts.to_be_had(limit).saturating_sub(beyond).min(limit) }))
    }
}

/// The number in a file; `None` where there is no such file, or no number in it.
fn read_number(file: &Path) -> io::Result<Option<u64>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", file.display()))),
    }
}

/// A field of a `memory.stat`.
fn value(stat: &str, field: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn memory(&self, own: &str) -> Option<GroupMemory> {
            self.write("own", own);
            Groups::beside(&self.0.path().join("own"), self.0.path()).memory().expect("all can be read")
        }
    }

    #[test]
    fn the_tightest_slice_counts_and_the_daemons_own_service_does_not() {
        let tree = Tree::new();
        let own = "0::/vms.slice/vms-web.slice/balancer.service\n";
        assert_eq!(tree.memory(own), None, "no limits, no room");
        tree.write("vms.slice/memory.max", "1000000\n");
        tree.write("vms.slice/memory.high", "max\n");
        tree.write("vms.slice/memory.current", "500000\n");
        tree.write("vms.slice/memory.stat", "anon 1\ninactive_file 100000\n");
        assert_eq!(tree.memory(own), Some(GroupMemory { limit: Bytes(970_000), free: Bytes(520_000) }));
        tree.write("vms.slice/vms-web.slice/memory.max", "max\n");
        tree.write("vms.slice/vms-web.slice/memory.high", "800000\n");
        tree.write("vms.slice/vms-web.slice/memory.current", "10000\n");
        assert_eq!(tree.memory(own), Some(GroupMemory { limit: Bytes(776_000), free: Bytes(520_000) }));
        tree.write("vms.slice/vms-web.slice/balancer.service/memory.max", "1000\n");
        tree.write("vms.slice/vms-web.slice/balancer.service/memory.current", "1000\n");
        assert_eq!(tree.memory(own).unwrap().limit, Bytes(776_000));
        // A scope or a container holds more than the daemon.
        tree.write("box.scope/memory.max", "1000\n");
        tree.write("box.scope/memory.current", "2000\n");
        assert_eq!(tree.memory("0::/box.scope"), Some(GroupMemory { limit: Bytes(970), free: Bytes::ZERO }));
        tree.write("memory.max", "1000\n");
        tree.write("memory.current", "0\n");
        assert_eq!(tree.memory("0::/").unwrap().free, Bytes(970), "the root of a namespace");
    }

    #[test]
    fn page_cache_on_both_lists_and_slabs_can_be_had_but_for_a_watermark() {
        let mib = |mib: u64| mib << 20;
        let limit = Bytes::gib(1).saturating_sub(Bytes::gib(1).percent(MARGIN_PERCENT));
        let low = Bytes::kib(5032);
        for (version, directory) in [("0::/a\n", "a"), ("4:memory:/a\n", "memory/a")] {
            let tree = Tree::new();
            tree.write(&format!("{directory}/memory.max"), &format!("{}\n", mib(1024)));
            tree.write(&format!("{directory}/memory.limit_in_bytes"), &format!("{}\n", mib(1024)));
            for usage in ["memory.current", "memory.usage_in_bytes"] {
                tree.write(&format!("{directory}/{usage}"), &format!("{}\n", mib(900)));
            }
            let stat = |active, inactive, slabs| {
                format!(
                    "active_file {active}\ninactive_file {inactive}\nslab_reclaimable {slabs}\n\
                     total_active_file {active}\ntotal_inactive_file {inactive}\n"
                )
            };
            tree.write(&format!("{directory}/memory.stat"), &stat(mib(500), mib(300), 0));
            let free = tree.memory(version).unwrap().free;
            let expected = limit.saturating_sub(Bytes::mib(100)).saturating_sub(low);
            assert!(free.0.abs_diff(expected.0) < 64 << 10, "{free}, {expected}");
            // Whatever nonsense it says, no more than the limit.
            tree.write(&format!("{directory}/memory.stat"), &stat(u64::MAX, u64::MAX, u64::MAX));
            assert_eq!(tree.memory(version).unwrap().free, limit);
        }
    }

    #[test]
    fn a_limit_that_can_not_be_read_is_not_taken_for_none() {
        for unreadable in ["memory.max", "memory.high", "memory.current"] {
            let tree = Tree::new();
            for file in ["memory.max", "memory.high", "memory.current"] {
                tree.write(&format!("box.scope/{file}"), "1000\n");
            }
            assert!(tree.memory("0::/box.scope").is_some());
            let file = tree.0.path().join("box.scope").join(unreadable);
            fs::remove_file(&file).unwrap();
            // Also root can't read it.
            fs::create_dir(&file).unwrap();
            let groups = Groups::beside(&tree.0.path().join("own"), tree.0.path());
            let error = groups.memory().unwrap_err().to_string();
            assert!(error.contains(unreadable), "{error}");
        }
    }

    #[test]
    fn version_1_is_read_too() {
        let tree = Tree::new();
        let own = "5:devices:/\n4:cpu,memory:/a/b\n0::/\n";
        tree.write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        tree.write("memory/memory.usage_in_bytes", "5\n");
        assert_eq!(tree.memory(own), None);
        tree.write("memory/a/memory.limit_in_bytes", "100000\n");
        tree.write("memory/a/memory.usage_in_bytes", "90000\n");
        tree.write("memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 40000\n");
        assert_eq!(tree.memory(own), Some(GroupMemory { limit: Bytes(97_000), free: Bytes(27_000) }));
    }

    #[test]
    fn what_is_not_there_or_is_nonsense_is_no_limit() {
        let tree = Tree::new();
        for own in ["", "nonsense", "0::/../../etc", "0:/", "\u{0}::"] {
            assert_eq!(tree.memory(own), None, "{own:?}");
        }
        tree.write("x/memory.max", "many\n");
        tree.write("x/memory.current", "-1\n");
        assert_eq!(tree.memory("0::/x"), None);
        assert_eq!(Groups::of(Path::new("/nowhere"), Path::new("/nowhere")).memory().unwrap(), None);
    }
}
