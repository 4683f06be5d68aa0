//! `[[vms]]`: where other VMMs' sockets are, and what their VMs may have.

use std::path::{Component, Path, PathBuf};

use api::limits::Wanted;
use api::runtime::LONGEST_NAME;
use glob::{MatchOptions, Pattern};
use serde::{Deserialize, Deserializer, de};

use crate::driver::Kind;

/// VMs of another VMM.
///
/// ```toml
/// [[vms]]
/// driver = "qemu"
/// sockets = "/run/qemu/*.qmp"
/// memory = "1G,min=256M"
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForeignVms {
    /// Which VMM it is.
    pub driver: Kind,
    /// Where its sockets are.
    pub sockets: Sockets,
    /// What each VM may have; without `max`, the VMM's size of the VM is its max. Without this setting a VM's
    /// memory stays as it is and is charged in full.
    #[serde(default, deserialize_with = "memory")]
    pub memory: Option<Wanted>,
}

/// A path, or several with `*`, `?`, `[a-z]` or `**`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets(Pattern);

/// A socket's path and the name of its VM.
pub type Named = (String, PathBuf);

impl Sockets {
    /// Reads a pattern.
    ///
    /// # Errors
    /// A sentence: it is no pattern, or no absolute path.
    pub fn new(text: &str) -> Result<Self, String> {
        if !text.starts_with('/') {
            return Err(format!("`{text}` is not an absolute path: sockets are named from the root on"));
        }
        let pattern = Pattern::new(text).map_err(|error| {
            format!("`{text}` is no pattern of paths: {} (at character {})", error.msg, error.pos + 1)
        })?;
        Ok(Self(pattern))
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The sockets there are now, sorted by path, except where paths can't be read.
    pub fn find(&self) -> Vec<Named> {
        // A name that begins with a dot is hidden from `*`, as in a shell.
        let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
        let Ok(paths) = glob::glob_with(self.as_str(), options) else { return Vec::new() };
        paths.flatten().map(|path| (self.name(&path), path)).collect()
    }

    /// The directory that changes when the first of the sockets comes or goes.
    pub fn parent(&self) -> PathBuf {
        let whole = Path::new(self.as_str());
        let mut fixed: PathBuf = whole.components().take_while(|component| !is_pattern(component)).collect();
        if fixed.components().eq(whole.components()) {
            fixed.pop();
        }
        fixed
    }

    /// The name of the VM at `path`: the file's name without its extension, or the directory that the last
    /// pattern stands for if only directories differ, as with Firecracker's jailer.
    fn name(&self, path: &Path) -> String {
        let pattern: Vec<_> = Path::new(self.as_str()).components().collect();
        let behind = pattern.iter().rev().position(is_pattern).unwrap_or(0);
        let part = if behind == 0 {
            path.file_stem()
        } else {
            path.components().rev().nth(behind).map(Component::as_os_str)
        };
        named(&part.unwrap_or_default().to_string_lossy())
    }
}

fn is_pattern(component: &Component<'_>) -> bool {
    component.as_os_str().to_string_lossy().contains(['*', '?', '['])
}

/// A valid VM name (see [`api::runtime::check_name`]) for a file with any name.
fn named(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(LONGEST_NAME)
        .collect();
    match plain.trim_start_matches('-') {
        "" => "vm".to_owned(),
        name => name.to_owned(),
    }
}

impl<'de> Deserialize<'de> for Sockets {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::new(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}

fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Wanted>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use api::runtime::check_name;
    use std::fs;

    use super::*;

    fn sockets(text: &str) -> Sockets {
        Sockets::new(text).unwrap()
    }

    #[test]
    fn a_vm_is_called_after_what_tells_its_socket_from_others() {
        for (pattern, path, name) in [
            ("/run/qemu/*.qmp", "/run/qemu/web.qmp", "web"),
            ("/run/qemu/web.qmp", "/run/qemu/web.qmp", "web"),
            ("/run/qemu/*", "/run/qemu/Web_1.example.qmp", "web-1-example"),
            (
                "/srv/jailer/firecracker/*/root/run/firecracker.socket",
                "/srv/jailer/firecracker/551e7604/root/run/firecracker.socket",
                "551e7604",
            ),
            ("/var/lib/vms/**/api.sock", "/var/lib/vms/a/b/api.sock", "b"),
            ("/run/*", "/run/...", "vm"),
        ] {
            let found = sockets(pattern).name(Path::new(path));
            assert_eq!(found, name, "{pattern}");
            check_name(&found).unwrap();
        }
        check_name(&named(&"Ä".repeat(200))).unwrap();
        check_name(&named(&"x".repeat(200))).unwrap();
    }

    #[test]
    fn what_is_watched_is_the_part_without_patterns() {
        for (pattern, parent) in [
            ("/run/qemu/*.qmp", "/run/qemu"),
            ("/run/qemu/web.qmp", "/run/qemu"),
            ("/srv/*/root/api.sock", "/srv"),
            ("/*", "/"),
        ] {
            assert_eq!(sockets(pattern).parent(), Path::new(parent), "{pattern}");
        }
    }

    #[test]
    fn files_are_found() {
        let directory = tempfile::tempdir().unwrap();
        for file in ["b.qmp", "a.qmp", "a.log", ".hidden.qmp"] {
            fs::write(directory.path().join(file), "").unwrap();
        }
        let found = sockets(&format!("{}/*.qmp", directory.path().display())).find();
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(sockets("/nowhere/*.qmp").find().is_empty());
    }

    #[test]
    fn wrong_entries_are_refused_with_a_reason() {
        let read = |text: &str| toml::from_str::<ForeignVms>(text).map_err(|error| error.to_string());
        let entry =
            read("driver = \"qemu\"\nsockets = \"/run/qemu/*.qmp\"\nmemory = \"1G,min=256M\"").unwrap();
        assert_eq!(entry.memory, Some("1G,min=256M".parse().unwrap()));
        assert_eq!(read("driver = \"qemu\"\nsockets = \"/a\"").unwrap().memory, None);
        for (text, word) in [
            ("driver = \"xen\"\nsockets = \"/a\"", "xen"),
            ("sockets = \"/a\"", "driver"),
            ("driver = \"qemu\"", "sockets"),
            ("driver = \"qemu\"\nsockets = \"run/a\"", "absolute"),
            ("driver = \"qemu\"\nsockets = \"/run/[a\"", "pattern"),
            ("driver = \"qemu\"\nsockets = \"/a\"\nmemory = \"1G,min=2G\"", "must hold"),
            ("driver = \"qemu\"\nsockets = \"/a\"\nlimits = \"1G\"", "limits"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
