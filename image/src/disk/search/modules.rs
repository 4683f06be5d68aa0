//! Modules that a kernel finds in its root file system, where the distribution's udev loads them as devices come.

use super::super::SearchError;
use super::super::files::{Files, text};

/// Where distributions have their kernels' modules.
const TREES: [&str; 2] = ["/usr/lib/modules", "/lib/modules"];
/// How modules are packed.
const ENDINGS: [&str; 4] = ["", ".xz", ".zst", ".gz"];

/// Where a kernel has a module, which is a path such as `kernel/drivers/virtio/virtio_mem.ko`; `None` where it has none,
/// or where the kernel's name does not tell its version.
///
/// # Errors
/// [`SearchError`].
pub fn of_kernel(files: &dyn Files, kernel: &str, module: &str) -> Result<Option<String>, SearchError> {
    let name = kernel.rsplit('/').next().unwrap_or_default();
    let Some(version) = name.strip_prefix("vmlinuz-").filter(|version| !version.is_empty()) else {
        return Ok(None);
    };
    for tree in TREES {
        let directory = format!("{tree}/{version}");
        for ending in ENDINGS {
            let path = format!("{directory}/{module}{ending}");
            if files.size(&path)?.is_some_and(|size| size > 0) {
                return Ok(Some(path));
            }
        }
        let list = format!("{directory}/modules.builtin");
        let built_in = text(files, &list)?.unwrap_or_default();
        if built_in.lines().any(|line| line == module) {
            return Ok(Some(list));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files and what is in them.
    struct Tree<'a>(&'a [(&'a str, &'a str)]);

    impl Files for Tree<'_> {
        fn names(&self, _: &str) -> Result<Vec<String>, SearchError> {
            Ok(Vec::new())
        }

        fn size(&self, path: &str) -> Result<Option<u64>, SearchError> {
            Ok(self.0.iter().find(|(name, _)| *name == path).map(|(_, text)| text.len() as u64))
        }

        fn resolve(&self, path: &str) -> Result<String, SearchError> {
            Ok(path.to_owned())
        }

        fn read(
            &self,
            path: &str,
            take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>,
        ) -> Result<(), SearchError> {
            self.0.iter().find(|(name, _)| *name == path).map_or(Ok(()), |(_, text)| take(text.as_bytes()))
        }
    }

    const MODULE: &str = "kernel/drivers/virtio/virtio_mem.ko";

    fn found(paths: &[(&str, &str)], kernel: &str) -> Option<String> {
        of_kernel(&Tree(paths), kernel, MODULE).expect("it can be read")
    }

    #[test]
    fn a_module_is_found_by_the_kernels_version() {
        let packed = "/lib/modules/6.1.0-9-amd64/kernel/drivers/virtio/virtio_mem.ko.xz";
        let files = [(packed, "module"), ("/lib/modules/5.10/kernel/drivers/virtio/virtio_mem.ko", "")];
        assert_eq!(found(&files, "/boot/vmlinuz-6.1.0-9-amd64").as_deref(), Some(packed));
        for other in ["/boot/vmlinuz-5.10", "/boot/vmlinuz-6.1", "/boot/vmlinuz-", "/6.1.0-9-amd64/linux"] {
            assert_eq!(found(&files, other), None, "{other}");
        }
        let list = "/usr/lib/modules/6.12/modules.builtin";
        let files = [(list, "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio_mem.ko\n")];
        assert_eq!(found(&files, "/vmlinuz-6.12").as_deref(), Some(list));
    }
}
