//! What a user asks for when a VM is made.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use api::limits::Limits;
use image::Unpacking;
use image::disk::Finder;
use serde::{Deserialize, Serialize};

/// Types that are text in a configuration, read by the same rule as on the command line.
macro_rules! text {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = ConfigError;
            fn try_from(text: String) -> Result<Self, ConfigError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )*};
}

mod cmdline;
mod device;
mod net;
mod share;
mod vsock;

pub use cmdline::{DEFAULT_CMDLINE, Hindrance, behind_words, with_words};
pub use device::{
    BalloonOptions, Console, Device, DeviceConfig, DeviceId, DiskFormat, DiskOptions, SerialOptions,
    ThreadName,
};
pub use net::{Forward, NetBackend, NetOptions, Protocol, UserNet};
pub use share::{ShareOptions, Tag};
pub use vsock::{ServedPort, VsockOptions};

text!(Name);

/// The most vCPUs a VM may have: as many as xAPIC identifiers can name, 0 to 254; 255 is everybody (SDM volume 3,
/// 11.6.2.1). More would take x2APIC identifiers, and interrupts remapped to them.
pub const MOST_CPUS: u8 = 255;

/// Everything that makes one VM. Each part has been checked on its own; [`check`](Self::check) looks at
/// whether they go together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's name, and its socket's.
    pub name: Name,
    /// A bzImage, or an uncompressed ELF with a PVH note; `None` boots what the first disk has.
    pub kernel: Option<PathBuf>,
    /// Who finds the kernel on a disk; `None` has nobody look.
    #[serde(default)]
    pub finder: Option<Finder>,
    /// How what is packed in a bzImage is unpacked on the host; `None` has it unpack itself.
    #[serde(default)]
    pub unpacking: Option<Unpacking>,
    /// The initial RAM file system, in place of that which a disk has.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, as the user wrote it; [`DEFAULT_CMDLINE`] is a good start. What a disk says of it
    /// comes before.
    pub cmdline: String,
    /// Memory at start, and how far it may move.
    pub limits: Limits,
    /// vCPUs.
    pub cpus: Cpus,
    /// What the guest's memory is made of.
    #[serde(default)]
    pub memory: MemoryOptions,
    /// How the guest reaches its virtio devices.
    #[serde(default)]
    pub transport: Transport,
    /// The devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceConfig>,
    /// Where the API listens; `None` is a VM without an API.
    pub socket: Option<PathBuf>,
    /// Whether the process gives up what a running VM does not need ([`crate::sandbox`]).
    pub sandbox: bool,
}

impl VmConfig {
    /// Whether its devices go together.
    ///
    /// # Errors
    /// [`ConfigError`] says which do not.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut ids = BTreeSet::new();
        let mut kinds = BTreeSet::new();
        for DeviceConfig { id, device, .. } in &self.devices {
            if !ids.insert(id) {
                return Err(ConfigError::SameId(id.clone()));
            }
            if let Some(kind) = device.only_one()
                && !kinds.insert(kind)
            {
                return Err(ConfigError::Two(kind));
            }
        }
        if !kinds.contains("balloon") {
            return Err(ConfigError::NoBalloon);
        }
        if let Some(share) = self.devices.iter().find(|config| matches!(config.device, Device::Share(_))) {
            if self.plugs_memory() {
                return Err(ConfigError::ShareAndPlug(share.id.clone()));
            }
            if self.memory.backing == Backing::Anonymous {
                return Err(ConfigError::ShareOfPrivate(share.id.clone()));
            }
        }
        Ok(())
    }

    /// Whether the guest boots with its startup memory and plugs the rest.
    pub fn plugs_memory(&self) -> bool {
        self.devices.iter().any(|config| config.device == Device::Memory)
    }
}

/// How a guest reaches its virtio devices (virtio 1.2, section 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// On a PCI bus: up to 31 devices, with an interrupt for each queue.
    #[default]
    Pci,
    /// By memory-mapped registers: up to seven devices, with one interrupt each. The guest starts sooner.
    Mmio,
}

/// Why a part of a configuration can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not `^[a-z0-9][a-z0-9-]{0,62}$`.
    #[error("`{0}` is not a VM name: use 1 to 63 of a-z, 0-9 and `-`, not `-` first")]
    Name(String),
    /// Not 1 to [`MOST_CPUS`].
    #[error("`{0}` is not a number of vCPUs: use 1 to {MOST_CPUS}")]
    Cpus(String),
    /// Not `^[a-z0-9][a-z0-9-]{0,62}$`.
    #[error("`{0}` is not a device's name: use 1 to 63 of a-z, 0-9 and `-`, not `-` first")]
    DeviceId(String),
    /// Not `^[a-z0-9][a-z0-9-]{0,62}$`.
    #[error("`{0}` is not a thread's name: use 1 to 63 of a-z, 0-9 and `-`, not `-` first")]
    ThreadName(String),
    /// Two devices have one name.
    #[error("two devices are called `{0}`: give each a name of its own")]
    SameId(DeviceId),
    /// Two devices of a kind of which there is one at most.
    #[error("a VM has one device of type `{0}` at most")]
    Two(&'static str),
    /// Nothing moves its memory.
    #[error("each VM needs a device of type `balloon`")]
    NoBalloon,
    /// Not a console.
    #[error("`{0}` is not a console: use stdio, file:PATH, socket:PATH or none")]
    Console(String),
    /// Not a disk.
    #[error(
        "`{text}` is not a disk ({what}): use PATH, then with commas readonly, format=raw or format=qcow2, \
         cache=direct or cache=buffered, backing=allow, on-error=report, pause or pause-when-full, iops=N, \
         iops-burst=N, bytes-per-second=SIZE, bytes-burst=SIZE; a comma of the path is written twice"
    )]
    Disk {
        /// As given.
        text: String,
        /// What is wrong.
        what: String,
    },
    /// Not a network card.
    #[error(
        "`{text}` is not a network ({what}): use user, tap=NAME, bridge=NAME or fd=N, then with commas mac=MAC, mtu=BYTES, \
         packets-per-second=N, packets-burst=N, bytes-per-second=SIZE, bytes-burst=SIZE; with user also forward=tcp:PORT:PORT, dns=ADDRESS, loopback"
    )]
    Net {
        /// As given.
        text: String,
        /// What is wrong.
        what: String,
    },
    /// Not a forward.
    #[error(
        "`{0}` is not a forward: use tcp:PORT:PORT or udp:PORT:PORT, the host's port first, or \
         tcp:ADDRESS:PORT:PORT to listen at one address of the host; an IPv6 address stands in brackets"
    )]
    Forward(String),
    /// Not a port of the host with the socket that serves it.
    #[error("`{0}` is no port with a socket: use PORT:PATH, such as 1024:/run/user/1000/app.sock")]
    ServedPort(String),
    /// A port of the host without a socket.
    #[error(
        "port {0} has no socket that serves it: name one, as {0}:PATH, or use --vsock-socket PATH, beside which it is \
         PATH_{0}"
    )]
    ServedNowhere(u32),
    /// Two sockets for one port.
    #[error("port {0} is served twice: name each port once")]
    ServedTwice(u32),
    /// Not a shared directory.
    #[error(
        "`{text}` is not a shared directory ({what}): use DIR, then with commas tag=TAG, readonly; a comma of the \
         path is written twice"
    )]
    Share {
        /// As given.
        text: String,
        /// What is wrong.
        what: String,
    },
    /// Not a tag.
    #[error("`{0}` is not a tag of a shared directory: use 1 to 36 bytes, without spaces and commas")]
    Tag(String),
    /// A process that shares directories would see memory that was not given to the guest.
    #[error(
        "`{0}`, a shared directory, does not go with memory that is plugged: the process that shares it has the \
         guest's memory mapped, and nothing would keep it from what is not plugged; use --grow balloon"
    )]
    ShareAndPlug(DeviceId),
    /// Nobody else can map it.
    #[error(
        "`{0}`, a shared directory, needs guest memory that another process can map: use --memory-backing memfd, or \
         --hugepages 2M"
    )]
    ShareOfPrivate(DeviceId),
    /// Not a size of huge pages that is known.
    #[error("`{0}` is not a size of huge pages: use 2M")]
    HugePages(String),
}

/// A VM's name, by the rule of [`api::runtime::check_name`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Cpus(u8);

impl Cpus {
    /// One vCPU.
    pub const ONE: Self = Self(1);

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for Cpus {
    type Error = ConfigError;
    fn try_from(count: u8) -> Result<Self, ConfigError> {
        match count {
            1..=MOST_CPUS => Ok(Self(count)),
            _ => Err(ConfigError::Cpus(count.to_string())),
        }
    }
}

impl From<Cpus> for u8 {
    fn from(cpus: Cpus) -> Self {
        cpus.0
    }
}

impl FromStr for Cpus {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let count: u8 = text.parse().map_err(|_| ConfigError::Cpus(text.to_owned()))?;
        count.try_into()
    }
}

/// What the guest's memory is made of on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryOptions {
    /// The kind of mapping.
    pub backing: Backing,
    /// Ask the host for transparent huge pages (`MADV_HUGEPAGE`).
    pub thp: bool,
    /// Touch every page before the guest starts.
    pub prefault: bool,
}

/// The kind of mapping that guest memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd, mapped shared: another process could map it too.
    Memfd,
    /// Reserved huge pages of 2 MiB (hugetlbfs).
    #[serde(rename = "hugepages-2m")]
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

#[cfg(test)]
pub(super) mod tests {
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
    fn consoles_and_cpus_are_read() {
        assert_eq!("file:/tmp/x:y".parse(), Ok(Console::File("/tmp/x:y".into())));
        assert_eq!("none".parse(), Ok(Console::None));
        for bad in ["", "file:", "file", "tty:x"] {
            assert!(bad.parse::<Console>().is_err(), "{bad}");
        }
        assert_eq!("4".parse::<Cpus>().map(Cpus::get), Ok(4));
        for bad in ["0", "256", "-1", "two"] {
            assert!(bad.parse::<Cpus>().is_err(), "{bad}");
        }
    }

    pub(in crate::config) fn config(devices: &str) -> Result<VmConfig, serde_json::Error> {
        serde_json::from_str(&format!(
            r#"{{"name": "web", "kernel": "/boot/vmlinuz", "initrd": null, "cmdline": "quiet", "cpus": 2,
                "limits": {{"startup": 67108864, "min": 67108864, "max": 134217728}}, "socket": null,
                "sandbox": true, "memory": {{"backing": "memfd"}}, "devices": [{devices}]}}"#
        ))
    }

    #[test]
    fn a_configuration_is_data() {
        let read = config(
            r#"{"id": "serial0", "type": "serial", "console": "file:/tmp/x"},
            {"id": "balloon", "type": "balloon", "statistics_interval_ms": 500},
            {"id": "rng", "type": "rng", "thread": "rng"}, {"id": "memory", "type": "memory"}"#,
        );
        let config = read.expect("it is whole");
        assert_eq!(config.check(), Ok(()));
        assert!(config.plugs_memory());
        assert_eq!(config.devices[0].device, {
            Device::Serial(SerialOptions { console: Console::File("/tmp/x".into()) })
        });
        let Device::Balloon(balloon) = config.devices[1].device else { panic!("a balloon") };
        assert_eq!((balloon.statistics_interval.as_millis(), balloon.reporting), (500, true));
        assert_eq!(config.devices[2].thread.as_ref().map(ThreadName::as_str), Some("rng"));
        let text = serde_json::to_string(&config).expect("it can be written");
        assert_eq!(serde_json::from_str::<VmConfig>(&text).expect("and read"), config);
    }

    #[test]
    fn what_makes_no_vm_is_refused() {
        let balloon = r#"{"id": "balloon", "type": "balloon"}"#;
        for (devices, error) in [
            (String::new(), ConfigError::NoBalloon),
            (format!(r#"{balloon}, {{"id": "balloon", "type": "rng"}}"#), {
                ConfigError::SameId("balloon".parse().unwrap())
            }),
            (format!(r#"{balloon}, {{"id": "other", "type": "balloon"}}"#), ConfigError::Two("balloon")),
            (
                format!(
                    r#"{balloon}, {{"id": "m", "type": "memory"}}, {{"id": "s", "type": "share", "path": "/"}}"#
                ),
                ConfigError::ShareAndPlug("s".parse().unwrap()),
            ),
        ] {
            assert_eq!(config(&devices).expect("it can be read").check(), Err(error));
        }
        for bad in [
            r#"{"id": "a/b", "type": "rng"}"#,
            r#"{"id": "rng", "type": "teapot"}"#,
            r#"{"id": "rng", "type": "rng", "thread": "A"}"#,
            r#"{"id": "serial", "type": "serial", "console": "tty:x"}"#,
            r#"{"id": "balloon", "type": "balloon", "deflate": true}"#,
        ] {
            assert!(config(bad).is_err(), "{bad}");
        }
    }
}
