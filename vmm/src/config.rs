//! What a user asks for when a VM is made.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use api::limits::Limits;

/// The most vCPUs a VM may have: well below the 255 that xAPIC identifiers can name.
pub const MOST_CPUS: u8 = 64;

/// Everything that makes one VM. Each part has been checked on its own.
#[derive(Clone, Debug)]
pub struct Config {
    /// The VM's name, and its socket's.
    pub name: Name,
    /// A bzImage, or an uncompressed ELF with a PVH note.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, as the user wrote it; [`DEFAULT_CMDLINE`] is a good start.
    pub cmdline: String,
    /// Memory at start, and how far it may move.
    pub limits: Limits,
    /// vCPUs.
    pub cpus: Cpus,
    /// Where the first serial port goes.
    pub console: Console,
    /// What the guest's memory is made of.
    pub memory: MemoryOptions,
    /// How the guest gets memory beyond what it starts with.
    pub grow: Grow,
    /// How the balloon behaves.
    pub balloon: BalloonOptions,
    /// Whether the guest gets a port for its agent.
    pub agent: bool,
    /// Where the API listens; `None` is a VM without an API.
    pub socket: Option<PathBuf>,
    /// Whether the process gives up what a running VM does not need ([`crate::sandbox`]).
    pub sandbox: bool,
}

impl Config {
    /// The directories in which this VM has sockets to remove at its end.
    pub(crate) fn socket_directories(&self) -> Vec<PathBuf> {
        let console = match &self.console {
            Console::Socket(path) => Some(path),
            _ => None,
        };
        let parent = |path: &PathBuf| match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Some(PathBuf::from(".")),
            parent => parent.map(PathBuf::from),
        };
        self.socket.iter().chain(console).filter_map(parent).collect()
    }
}

/// A command line for a guest whose console is the serial port, whose panic ends the
/// process at once, and which does not look for a PCI bus that is not there (that would
/// be some 300 exits).
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 pci=off";

/// Why a part of a configuration can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not `^[a-z0-9][a-z0-9-]{0,62}$`.
    #[error("`{0}` is not a VM name: use 1 to 63 of a-z, 0-9 and `-`, not `-` first")]
    Name(String),
    /// Not 1 to [`MOST_CPUS`].
    #[error("`{0}` is not a number of vCPUs: use 1 to {MOST_CPUS}")]
    Cpus(String),
    /// Not a console.
    #[error("`{0}` is not a console: use stdio, file:PATH, socket:PATH or none")]
    Console(String),
    /// Not a size of huge pages that is known.
    #[error("`{0}` is not a size of huge pages: use 2M")]
    HugePages(String),
}

/// A VM's name, by the rule of [`api::runtime::check_name`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        api::runtime::check_name(text).map_err(|_| ConfigError::Name(text.to_owned()))?;
        Ok(Self(text.to_owned()))
    }
}

/// A number of vCPUs, 1 to [`MOST_CPUS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(u8);

impl Cpus {
    /// One vCPU.
    pub const ONE: Self = Self(1);

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl FromStr for Cpus {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.parse() {
            Ok(count @ 1..=MOST_CPUS) => Ok(Self(count)),
            _ => Err(ConfigError::Cpus(text.to_owned())),
        }
    }
}

/// Where the guest's first serial port goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output, a terminal or pipes.
    Stdio,
    /// Output into a file, made anew; no input.
    File(PathBuf),
    /// A Unix socket that the VM listens on; one client at a time, both ways.
    Socket(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for Console {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(ConfigError::Console(text.to_owned())),
        }
    }
}

/// What the guest's memory is made of on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// The kind of mapping.
    pub backing: Backing,
    /// Ask the host for transparent huge pages (`MADV_HUGEPAGE`).
    pub thp: bool,
    /// Touch every page before the guest starts.
    pub prefault: bool,
}

/// The kind of mapping that guest memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd, mapped shared: another process could map it too.
    Memfd,
    /// Reserved huge pages of 2 MiB (hugetlbfs).
    HugePages2M,
}

impl Backing {
    /// Reads what `--hugepages` takes: `2M`.
    ///
    /// # Errors
    /// [`ConfigError::HugePages`] for any other text.
    pub fn huge_pages(text: &str) -> Result<Self, ConfigError> {
        match text.to_ascii_lowercase().as_str() {
            "2m" | "2mib" => Ok(Self::HugePages2M),
            _ => Err(ConfigError::HugePages(text.to_owned())),
        }
    }
}

/// How a guest gets memory beyond what it starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Grow {
    /// It boots with the memory of `max`, and a balloon holds back what is above `startup`. Any
    /// guest with a balloon driver can.
    #[default]
    Balloon,
    /// It boots with `startup` and plugs the rest (virtio-mem). It needs the driver for it, and
    /// can't reach memory that it was not given.
    Plug,
}

/// What a guest that plugs needs on its kernel's command line: memory that is used as soon as it
/// is plugged, and is kept movable, so that it can be unplugged, as long as the guest has
/// a quarter that is not (Linux 5.16 and later: Documentation/admin-guide/mm/memory-hotplug.rst).
/// A word that the user gave as well stays as it is.
pub fn plug_cmdline(cmdline: &str) -> String {
    let words = ["memhp_default_state=online", "memory_hotplug.online_policy=auto-movable"];
    words.iter().fold(cmdline.to_owned(), |line, word| {
        let name = word.split_once('=').map_or(*word, |(name, _)| name);
        let given = line.split_whitespace().any(|other| other.split('=').next() == Some(name));
        if given { line } else { format!("{line} {word}") }
    })
}

/// How the balloon behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Offer VIRTIO_BALLOON_F_DEFLATE_ON_OOM: a guest that runs out of memory takes pages back.
    pub deflate_on_oom: bool,
    /// Offer VIRTIO_BALLOON_F_PAGE_REPORTING: a guest hands over free pages without being asked.
    pub reporting: bool,
    /// How often the guest is asked for statistics; zero asks never.
    pub statistics_interval: Duration,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self { deflate_on_oom: true, reporting: true, statistics_interval: Duration::from_secs(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_file_names() {
        for good in ["a", "web-1", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<Name>().map(|n| n.to_string()).as_deref(), Ok(good));
        }
        for bad in ["", "-a", "A", "a.b", "../x", "a/b", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_the_user_says_about_plugged_memory_stands() {
        let line = plug_cmdline("quiet memhp_default_state=online_movable");
        let expected = "quiet memhp_default_state=online_movable memory_hotplug.online_policy=auto-movable";
        assert_eq!(line, expected);
    }

    #[test]
    fn consoles_and_cpus_are_read() {
        assert_eq!("file:/tmp/x:y".parse(), Ok(Console::File("/tmp/x:y".into())));
        assert_eq!("none".parse(), Ok(Console::None));
        for bad in ["", "file:", "file", "tty:x"] {
            assert!(bad.parse::<Console>().is_err(), "{bad}");
        }
        assert_eq!("4".parse::<Cpus>().map(Cpus::get), Ok(4));
        for bad in ["0", "65", "-1", "two"] {
            assert!(bad.parse::<Cpus>().is_err(), "{bad}");
        }
    }
}
