//! The daemon's settings: a TOML file, with the command line on top.

mod foreign;
mod mistakes;

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::units::Bytes;
use serde::{Deserialize, Deserializer, de};

pub use self::foreign::{ForeignVms, Sockets};
pub use self::mistakes::Mistake;
use crate::host::{self, Budget, Sources};
use crate::policy::Settings;

/// The shortest time between two rounds.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);

/// The longest time between two rounds: a guest in need waits that long.
pub const LONGEST_INTERVAL: Duration = Duration::from_secs(60);

/// The file that is read by default.
pub const DEFAULT_FILE: &str = "/etc/ballast/balancer.toml";

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
    /// It is not TOML, or has wrong keys or values.
    #[error("the configuration is wrong:{}", list(.path, .mistakes))]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// Everything that is wrong.
        mistakes: Vec<Mistake>,
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
    /// One of several daemons without a budget of its own.
    #[error(
        "a balancer beside others (beside_others) needs a budget of its own: name one such as 4G, which the others \
         leave alone"
    )]
    BesideOthers,
    /// The host keeps all that it has.
    #[error("a host reserve of {reserve} leaves nothing of the host's {total} to any VM: name a smaller one")]
    Reserve {
        /// As set.
        reserve: Bytes,
        /// The host's memory.
        total: Bytes,
    },
}

fn list(path: &Path, mistakes: &[Mistake]) -> String {
    mistakes.iter().fold(String::new(), |mut text, mistake| {
        // Writing to a String does not fail.
        let _ = write!(text, "\n  {}, {mistake}", path.display());
        text
    })
}

/// All settings. Every field has a default; an unknown key is an error.
///
/// `resources/balancer.toml` is an example with all of them, and
/// `resources/balancer.schema.json` describes them to editors.
///
/// ```toml
/// budget = "2G"           # what all VMs together may hold; without it, all but host_reserve
/// beside_others = false   # other balancers share this host, each with a budget of its own
/// host_reserve = "512M"   # what the host keeps
/// interval = "1s"         # between two rounds
/// metrics = "127.0.0.1:9090"
/// last_resort = "advise"  # or "pause"
/// [policy]
/// pool_percent = 3
///
/// [[vms]]                 # VMs of another VMM
/// driver = "qemu"
/// sockets = "/run/qemu/*.qmp"
/// memory = "1G,min=256M"
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the VMs' sockets are; `None` is [`api::runtime::directory`].
    pub directory: Option<PathBuf>,
    /// What all VMs together may hold; `None` is all of the host but [`Config::host_reserve`].
    #[serde(deserialize_with = "budget")]
    pub budget: Option<Bytes>,
    /// Other daemons share this host, each with a [`Config::budget`] of its own, and so does this one.
    pub beside_others: bool,
    /// What the host keeps for itself and other programs; no effect with [`Config::budget`].
    #[serde(deserialize_with = "size")]
    pub host_reserve: Bytes,
    /// The time between two rounds.
    #[serde(deserialize_with = "interval")]
    pub interval: Duration,
    /// Where Prometheus may fetch `/metrics` over TCP, besides the daemon's own socket.
    pub metrics: Option<SocketAddr>,
    /// What is done when VMs hold more than there is and none can give more.
    pub last_resort: LastResort,
    /// The policy's constants.
    #[serde(deserialize_with = "policy")]
    pub policy: Settings,
    /// VMs of other VMMs, and where they are spoken to.
    pub vms: Vec<ForeignVms>,
    /// Where the host's memory is read; other files only in tests.
    #[serde(skip)]
    pub sources: Sources,
    /// The name by which the daemons of one host know each other, [`super::HOST_LOCK`]. `None`, in tests, is one
    /// of which no other knows.
    #[serde(skip)]
    pub host_lock: Option<String>,
}

/// What is done when an emergency has lasted, VMs hold more than there is, none can give more, and the host
/// has no swap for the rest. A VM that the balancer paused is resumed when there is room for it, whatever
/// this is set to by then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LastResort {
    /// The log says which VM should be paused.
    #[default]
    Advise,
    /// That VM is paused. For VMs of other VMMs, which don't know who paused them, it stays advice.
    Pause,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            directory: None,
            budget: None,
            beside_others: false,
            host_reserve: host::DEFAULT_RESERVE,
            interval: Duration::from_secs(1),
            metrics: None,
            last_resort: LastResort::default(),
            vms: Vec::new(),
            policy: Settings::default(),
            sources: Sources::default(),
            host_lock: None,
        }
    }
}

impl Config {
    /// Reads a file. Check the result with [`Config::validate`] once the command line is in it.
    ///
    /// # Errors
    /// [`ConfigError::Read`] or [`ConfigError::Wrong`] with every mistake.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        mistakes::read(&text).map_err(|mistakes| ConfigError::Wrong { path: path.to_owned(), mistakes })
    }

    /// Whether these settings make sense.
    ///
    /// # Errors
    /// [`ConfigError::Interval`], [`ConfigError::NoBudget`] or [`ConfigError::BesideOthers`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(SHORTEST_INTERVAL..=LONGEST_INTERVAL).contains(&self.interval) {
            return Err(ConfigError::Interval(self.interval));
        }
        if self.budget == Some(Bytes::ZERO) {
            return Err(ConfigError::NoBudget);
        }
        if self.beside_others && self.budget.is_none() {
            return Err(ConfigError::BesideOthers);
        }
        Ok(())
    }

    /// Whether these settings make sense on a host with this much memory.
    ///
    /// # Errors
    /// As [`Config::validate`], and [`ConfigError::Reserve`].
    pub fn validate_for(&self, total: Bytes) -> Result<(), ConfigError> {
        self.validate()?;
        if self.budget.is_none() && self.host_reserve >= total {
            return Err(ConfigError::Reserve { reserve: self.host_reserve, total });
        }
        Ok(())
    }

    /// What VMs may hold, as these settings say.
    pub fn to_budget(&self) -> Budget {
        self.budget.map_or(Budget::all_but(self.host_reserve), Budget::Fixed)
    }

    /// The policy's constants at the pace that is set.
    pub fn to_settings(&self) -> Settings {
        Settings { tick: self.interval, ..self.policy }
    }
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
    String::deserialize(from)?.parse().map_err(de::Error::custom)
}

fn budget<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Bytes>, D::Error> {
    match size(from)? {
        Bytes::ZERO => Err(de::Error::custom(ConfigError::NoBudget)),
        budget => Ok(Some(budget)),
    }
}

fn interval<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong_time(&text))?;
    let interval = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        _ => return Err(wrong_time(&text)),
    };
    let config = Config { interval, ..Config::default() };
    config.validate().map_err(de::Error::custom)?;
    Ok(interval)
}

fn wrong_time<E: de::Error>(text: &str) -> E {
    de::Error::custom(format_args!(
        "`{text}` is not a time: write a whole number and a unit, such as 1s or 500ms"
    ))
}

fn policy<'de, D: Deserializer<'de>>(from: D) -> Result<Settings, D::Error> {
    mistakes::checked(from, Settings::validate)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

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
            beside_others = true
            host_reserve = "1G"
            interval = "250ms"
            metrics = "127.0.0.1:9090"
            last_resort = "pause"
            policy.pool_percent = 5
        "#;
        let expected = Config {
            directory: Some("/run/vms".into()),
            budget: Some(Bytes::gib(2)),
            beside_others: true,
            host_reserve: Bytes::gib(1),
            interval: Duration::from_millis(250),
            metrics: Some("127.0.0.1:9090".parse().unwrap()),
            last_resort: LastResort::Pause,
            policy: Settings { pool_percent: 5, ..Settings::default() },
            ..Config::default()
        };
        assert_eq!(read(text).unwrap(), expected);
        assert_eq!(expected.to_settings().tick, Duration::from_millis(250));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, word) in [
            ("bugdet = \"2G\"", "line 1, column 1: bugdet: unknown field"),
            ("\nbudget = \"2X\"", "line 2, column 10: budget: "),
            ("interval = \"soon\"", "not a time"),
            ("interval = \"1h\"", "not a time"),
            ("interval = \"1ms\"", "interval: the interval of 1 ms is not between 50 ms and 60 s"),
            ("budget = \"0\"", "budget of 0"),
            ("beside_others = true", "needs a budget of its own"),
            ("beside_others = 1", "beside_others: "),
            ("metrics = \"here\"", "metrics: "),
            ("last_resort = \"kill\"", "unknown variant `kill`, expected `advise` or `pause`"),
            ("policy.pool_percent = 99", "pool_percent = 99 is out of range: 1 to 50"),
            ("policy = 3", "policy: "),
            ("= 1", "line 1"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        let all =
            read("budget = 5\nintervall = \"1s\"\n[policy]\npool = 3\nrest_seconds = \"x\"").unwrap_err();
        assert_eq!(all.to_string().lines().count(), 1 + 4, "{all}");
        assert!(Config::read(Path::new("/nowhere.toml")).unwrap_err().to_string().contains("/nowhere.toml"));
    }

    const EXAMPLE: &str = include_str!("../../../resources/balancer.toml");
    const SCHEMA: &str = include_str!("../../../resources/balancer.schema.json");

    /// The example with every line that is commented out.
    fn whole_example() -> String {
        EXAMPLE
            .lines()
            .map(|line| line.strip_prefix('#').filter(|l| !l.starts_with([' ', ':'])).unwrap_or(line))
            .fold(String::new(), |text, line| text + line + "\n")
    }

    fn schema() -> jsonschema::Validator {
        jsonschema::validator_for(&serde_json::from_str(SCHEMA).unwrap()).unwrap()
    }

    fn as_json(text: &str) -> Value {
        toml::from_str::<Value>(text).unwrap()
    }

    #[test]
    fn the_example_is_sound_and_has_every_setting_with_its_default() {
        assert_eq!(read(EXAMPLE).unwrap(), Config::default(), "what is not commented out is the default");
        let whole = whole_example();
        read(&whole).unwrap();
        let properties = |value: &Value, path: &str| -> BTreeSet<String> {
            let table = if path.is_empty() { value } else { &value[path] };
            table.as_object().unwrap().keys().cloned().collect()
        };
        let schema: Value = serde_json::from_str(SCHEMA).unwrap();
        let example = as_json(&whole);
        assert_eq!(properties(&example, ""), properties(&schema["properties"], ""));
        let policy = serde_json::to_value(Settings::default()).unwrap();
        assert_eq!(properties(&policy, ""), properties(&example, "policy"));
        assert_eq!(properties(&policy, ""), properties(&schema["properties"]["policy"]["properties"], ""));
    }

    #[test]
    fn the_schema_takes_what_the_types_take_and_refuses_what_they_refuse() {
        let schema = schema();
        assert!(schema.is_valid(&as_json(&whole_example())));
        for key in as_json(&whole_example()).as_object().unwrap().keys() {
            for wrong in [json!(true), json!(-1), json!([[]]), json!("~")] {
                let mut value = json!({});
                value[key] = wrong.clone();
                if key == "directory" && wrong.is_string() {
                    continue;
                }
                let text = toml::to_string(&value).unwrap();
                assert!(read(&text).is_err() && !schema.is_valid(&value), "{text}");
            }
        }
        for text in [
            "what = 1",
            "budget = \"0\"",
            "budget = \"1X\"",
            "interval = \"1h\"",
            "[policy]\nwhat = 1",
            "[[vms]]\ndriver = \"qemu\"",
            "[[vms]]\ndriver = \"xen\"\nsockets = \"/x\"",
            "[[vms]]\ndriver = \"qemu\"\nsockets = \"x\"",
            "[policy]\npool_percent = 0",
            "[policy]\npool_percent = 51",
            "[policy]\nrest_seconds = 3601",
        ] {
            assert!(read(text).is_err() && !schema.is_valid(&as_json(text)), "{text}");
        }
        for text in
            ["budget = \"1.5GiB\"", "interval = \"60s\"", "interval = \"50ms\"", "metrics = \"[::1]:9\""]
        {
            assert!(read(text).is_ok() && schema.is_valid(&as_json(text)), "{text}");
        }
    }
}
