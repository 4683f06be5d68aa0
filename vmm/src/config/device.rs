//! The devices of a VM, as data.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use api::units::Bytes;
use devices::bucket::{Rate, RateLimits};
use devices::virtio::block::handle::OnError;
use devices::virtio::block::raw::Cache;
use disks::seed::Seed;
use serde::{Deserialize, Serialize};

use super::{ConfigError, NetOptions, ShareOptions, VsockOptions};

text!(DeviceId, ThreadName, Console);

/// One device of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// Its name among the devices of this VM.
    pub id: DeviceId,
    /// The thread on which it works, where that is not the usual one of its kind. Devices that name the
    /// same thread share it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<ThreadName>,
    /// What it is.
    #[serde(flatten)]
    pub device: Device,
}

impl DeviceConfig {
    /// `device` on the usual thread of its kind.
    pub fn new(id: DeviceId, device: Device) -> Self {
        Self { id, thread: None, device }
    }
}

/// A kind of device, with its settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Device {
    /// The first serial port.
    Serial(SerialOptions),
    /// virtio-balloon: takes memory from the guest and gives it back. Each VM has one.
    Balloon(BalloonOptions),
    /// virtio-mem: the guest starts with its startup memory and plugs the rest. It needs the driver for it,
    /// and can't reach memory that it was not given. Without this device it boots with all of it in its
    /// memory map, and the balloon holds back what is above startup.
    Memory,
    /// virtio-rng: the host's randomness.
    Rng,
    /// virtio-blk: a disk.
    Disk(DiskOptions),
    /// virtio-blk: a small disk in memory that tells the guest's cloud-init how to set it up.
    CloudInit(Seed),
    /// virtio-net: a network card.
    Net(NetOptions),
    /// virtio-vsock: streams between programs in the guest and on the host.
    Vsock(VsockOptions),
    /// virtio-fs: a directory of the host, which a process beside the VM's shares.
    Share(ShareOptions),
    /// A virtio-console port for the guest's agent.
    Agent,
    /// A device that only tests know.
    #[cfg(test)]
    Note(devices::testing::note::NoteOptions),
}

impl Device {
    /// Its word in a configuration, of those of which a VM has one at most.
    pub(super) const fn only_one(&self) -> Option<&'static str> {
        match self {
            Self::Serial(_) => Some("serial"),
            Self::Balloon(_) => Some("balloon"),
            Self::Memory => Some("memory"),
            Self::Agent => Some("agent"),
            Self::CloudInit(_) => Some("cloud-init"),
            Self::Vsock(_) => Some("vsock"),
            _ => None,
        }
    }
}

/// The name of a device in its VM: 1 to 63 of a-z, 0-9 and `-`, not `-` first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceId(String);

impl DeviceId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for DeviceId {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        api::runtime::check_name(text).map_err(|_| ConfigError::DeviceId(text.to_owned()))?;
        Ok(Self(text.to_owned()))
    }
}

/// The name of a thread: 1 to 63 of a-z, 0-9 and `-`, not `-` first. The kernel shows 15 of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ThreadName(String);

impl ThreadName {
    /// The thread of devices that have little to do.
    pub fn shared() -> Self {
        Self("devices".to_owned())
    }

    /// The thread of what moves the guest's memory.
    pub fn memory() -> Self {
        Self("balloon".to_owned())
    }

    /// A thread for this device alone.
    pub fn own(id: &DeviceId) -> Self {
        Self(id.as_str().to_owned())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ThreadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for ThreadName {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        api::runtime::check_name(text).map_err(|_| ConfigError::ThreadName(text.to_owned()))?;
        Ok(Self(text.to_owned()))
    }
}

/// The serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialOptions {
    /// Where its line ends.
    pub console: Console,
}

/// Where the guest's first serial port goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Console {
    /// Standard input and output, a terminal or pipes.
    Stdio,
    /// Output to the end of a file; no input.
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

impl fmt::Display for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Socket(path) => write!(f, "socket:{}", path.display()),
            Self::None => f.write_str("none"),
        }
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// What the file is; without a word of the user its name says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Whether the host caches it; without a word of the user a disk that is written is not cached, and one
    /// that is only read is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// A qcow2 image may show other files, which it names, where it has nothing of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub backing: bool,
    /// What becomes of requests that the host can't do; without a word of the user the VM waits where the host
    /// has no room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
    /// How many operations the guest may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations: Option<Rate>,
    /// How many bytes the guest may read and write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
}

impl DiskOptions {
    /// The format, by the user's word or by the name.
    pub fn format(&self) -> DiskFormat {
        let is_qcow2 = self.path.extension().is_some_and(|end| end.eq_ignore_ascii_case("qcow2"));
        self.format.unwrap_or(if is_qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw })
    }

    /// Whether the host caches it.
    pub fn cache(&self) -> Cache {
        self.cache.unwrap_or(if self.readonly { Cache::Buffered } else { Cache::Direct })
    }

    /// What becomes of requests that the host can't do.
    pub fn on_error(&self) -> OnError {
        self.on_error.unwrap_or(OnError::PauseWhenFull)
    }

    /// What the guest may ask for.
    pub const fn limits(&self) -> RateLimits {
        RateLimits { operations: self.operations, bytes: self.bytes }
    }
}

/// A rate, with what passes at once after a silence: a tenth of a second's, unless said otherwise.
pub(super) fn rate(per_second: Option<u64>, burst: Option<u64>) -> Result<Option<Rate>, String> {
    match (per_second, burst) {
        (Some(per_second), burst) => {
            Ok(Some(Rate { per_second, burst: burst.unwrap_or_else(|| (per_second / 10).max(1)) }))
        }
        (None, Some(_)) => Err("a burst needs the rate that it is of".to_owned()),
        (None, None) => Ok(None),
    }
}

/// `PATH[,readonly][,format=raw|qcow2][,cache=direct|buffered][,backing=allow]
/// [,on-error=report|pause|pause-when-full][,iops=N[,iops-burst=N]][,bytes-per-second=SIZE[,bytes-burst=SIZE]]`: a
/// comma of the path itself is written twice.
impl FromStr for DiskOptions {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |what: String| ConfigError::Disk { text: text.to_owned(), what };
        let marked = text.replace(",,", "\0");
        let mut parts = marked.split(',').map(|part| part.replace('\0', ","));
        let path =
            parts.next().filter(|path| !path.is_empty()).ok_or_else(|| wrong("it names no file".into()))?;
        let mut disk = Self {
            path: path.into(),
            readonly: false,
            format: None,
            cache: None,
            backing: false,
            on_error: None,
            operations: None,
            bytes: None,
        };
        let (mut operations, mut bytes) = ((None, None), (None, None));
        let count = |text: &str| text.parse().ok().filter(|count| *count > 0);
        let size = |text: &str| text.parse().ok().map(|Bytes(size)| size).filter(|size| *size > 0);
        for part in parts {
            match part.split_once('=').unwrap_or((&part, "")) {
                ("readonly", "") => disk.readonly = true,
                ("format", "raw") => disk.format = Some(DiskFormat::Raw),
                ("format", "qcow2") => disk.format = Some(DiskFormat::Qcow2),
                ("cache", "direct") => disk.cache = Some(Cache::Direct),
                ("cache", "buffered") => disk.cache = Some(Cache::Buffered),
                ("backing", "allow") => disk.backing = true,
                ("on-error", "report") => disk.on_error = Some(OnError::Report),
                ("on-error", "pause") => disk.on_error = Some(OnError::Pause),
                ("on-error", "pause-when-full") => disk.on_error = Some(OnError::PauseWhenFull),
                ("iops", text) if count(text).is_some() => operations.0 = count(text),
                ("iops-burst", text) if count(text).is_some() => operations.1 = count(text),
                ("bytes-per-second", text) if size(text).is_some() => bytes.0 = size(text),
                ("bytes-burst", text) if size(text).is_some() => bytes.1 = size(text),
                _ => return Err(wrong(format!("`{part}` is not known"))),
            }
        }
        disk.operations = rate(operations.0, operations.1).map_err(wrong)?;
        disk.bytes = rate(bytes.0, bytes.1).map_err(wrong)?;
        Ok(disk)
    }
}

/// What a disk's file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's image format.
    Qcow2,
}

/// How the balloon behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalloonOptions {
    /// Offer VIRTIO_BALLOON_F_DEFLATE_ON_OOM: a guest that runs out of memory takes pages back.
    pub deflate_on_oom: bool,
    /// Offer VIRTIO_BALLOON_F_PAGE_REPORTING: a guest hands over free pages without being asked.
    #[serde(rename = "free_page_reporting")]
    pub reporting: bool,
    /// How often the guest is asked for statistics; zero asks never.
    #[serde(rename = "statistics_interval_ms", with = "milliseconds")]
    pub statistics_interval: Duration,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self { deflate_on_oom: true, reporting: true, statistics_interval: Duration::from_secs(1) }
    }
}

/// A span of time as a number of milliseconds.
mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disks_words_say_what_it_may_do() {
        let disk: DiskOptions =
            "a,,b.img,on-error=pause,iops=1000,bytes-per-second=20M,bytes-burst=64K".parse().unwrap();
        assert_eq!((disk.path.to_str(), disk.on_error()), (Some("a,b.img"), OnError::Pause));
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        assert_eq!(
            disk.limits(),
            RateLimits { operations: rate(1000, 100), bytes: rate(20 << 20, 64 << 10) }
        );
        let disk: DiskOptions = "a.img,iops=3".parse().unwrap();
        assert_eq!((disk.limits().operations, disk.on_error()), (rate(3, 1), OnError::PauseWhenFull));
        for wrong in
            ["iops=0", "iops=x", "iops-burst=5", "bytes-per-second=-1", "bytes-burst=1M", "on-error=stop"]
        {
            let error = format!("a.img,{wrong}").parse::<DiskOptions>().unwrap_err().to_string();
            assert!(error.contains("iops-burst=N"), "{error}");
        }
    }
}
