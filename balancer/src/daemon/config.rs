//! How the daemon is set up: a TOML file, and what the command line says on top.

mod foreign;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon::units::Bytes;
use serde::{Deserialize, Deserializer, de};

pub use self::foreign::{Foreign, Sockets};

use crate::host::{self, Budget};

/// The shortest time between two rounds.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);

/// The longest time between two rounds: a guest in need waits that long.
pub const LONGEST_INTERVAL: Duration = Duration::from_secs(60);

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read the configuration {}: {source}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not TOML, or a key or value is unknown; the sentence has line and column.
    #[error("in the configuration {}: {error}", .path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        error: toml::de::Error,
    },
    /// The interval is out of range.
    #[error(
        "the interval of {} ms is not between {} ms and {} s",
        .0.as_millis(), SHORTEST_INTERVAL.as_millis(), LONGEST_INTERVAL.as_secs()
    )]
    Interval(Duration),
    /// A budget of nothing.
    #[error("a budget of 0 leaves nothing to any VM: name a size such as 4G, or leave it out")]
    NoBudget,
}

/// Everything that can be set. Every field has a default; a key that is none of these is an error.
///
/// ```toml
/// budget = "2G"           # what all VMs together may hold; without it, all but host_reserve
/// host_reserve = "512M"   # what the host keeps
/// interval = "1s"         # between two rounds
/// metrics = "127.0.0.1:9090"
///
/// [[vms]]                 # VMs of another VMM
/// driver = "qemu"
/// sockets = "/run/qemu/*.qmp"
/// memory = "1G,min=256M"
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the VMs' sockets are; `None` is [`balloon::runtime::directory`].
    pub directory: Option<PathBuf>,
    /// What all VMs together may hold; `None` is all of the host but [`Config::host_reserve`].
    #[serde(deserialize_with = "optional_size")]
    pub budget: Option<Bytes>,
    /// What the host keeps for itself and other programs; no effect with [`Config::budget`].
    #[serde(deserialize_with = "size")]
    pub host_reserve: Bytes,
    /// The time between two rounds.
    #[serde(deserialize_with = "time")]
    pub interval: Duration,
    /// Where Prometheus may fetch `/metrics` over TCP, besides the daemon's own socket.
    pub metrics: Option<SocketAddr>,
    /// VMs of other VMMs, and where they are spoken to.
    pub vms: Vec<Foreign>,
    /// Where the host's memory is read; another file only in tests.
    #[serde(skip)]
    pub meminfo: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            directory: None,
            budget: None,
            host_reserve: host::DEFAULT_RESERVE,
            interval: Duration::from_secs(1),
            metrics: None,
            vms: Vec::new(),
            meminfo: PathBuf::from(host::MEMINFO),
        }
    }
}

impl Config {
    /// Reads a file. Check the result with [`Config::validate`] once the command line is in it.
    ///
    /// # Errors
    /// [`ConfigError::Read`] or [`ConfigError::Parse`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|error| ConfigError::Parse { path: path.to_owned(), error })
    }

    /// Whether these settings make sense.
    ///
    /// # Errors
    /// [`ConfigError::Interval`] or [`ConfigError::NoBudget`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(SHORTEST_INTERVAL..=LONGEST_INTERVAL).contains(&self.interval) {
            return Err(ConfigError::Interval(self.interval));
        }
        if self.budget == Some(Bytes::ZERO) {
            return Err(ConfigError::NoBudget);
        }
        Ok(())
    }

    /// What VMs may hold, as these settings say.
    pub fn to_budget(&self) -> Budget {
        self.budget.map_or(Budget::all_but(self.host_reserve), Budget::Fixed)
    }
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
    String::deserialize(from)?.parse().map_err(de::Error::custom)
}

fn optional_size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Bytes>, D::Error> {
    size(from).map(Some)
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong_time(&text))?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        _ => Err(wrong_time(&text)),
    }
}

fn wrong_time<E: de::Error>(text: &str) -> E {
    de::Error::custom(format_args!(
        "`{text}` is not a time: write a whole number and a unit, such as 1s or 500ms"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let config = Config::read(file.path())?;
        config.validate()?;
        Ok(config)
    }

    #[test]
    fn every_setting_has_a_default_and_is_read() {
        assert_eq!(read("").unwrap(), Config::default());
        let text = r#"
            directory = "/run/vms"
            budget = "2G"
            host_reserve = "1G"
            interval = "250ms"
            metrics = "127.0.0.1:9090"
        "#;
        let expected = Config {
            directory: Some("/run/vms".into()),
            budget: Some(Bytes::gib(2)),
            host_reserve: Bytes::gib(1),
            interval: Duration::from_millis(250),
            metrics: Some("127.0.0.1:9090".parse().unwrap()),
            ..Config::default()
        };
        assert_eq!(read(text).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, word) in [
            ("bugdet = \"2G\"", "bugdet"),
            ("budget = \"2X\"", "not a unit"),
            ("interval = \"soon\"", "not a time"),
            ("interval = \"1h\"", "not a time"),
            ("interval = \"1ms\"", "between"),
            ("budget = \"0\"", "budget of 0"),
            ("metrics = \"here\"", "metrics"),
            ("= 1", "configuration"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(Config::read(Path::new("/nowhere.toml")).unwrap_err().to_string().contains("/nowhere.toml"));
    }
}
