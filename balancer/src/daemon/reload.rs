//! Changes settings while the daemon runs: all of them or none.

use api::units::Bytes;
use tracing::{info, warn};

use super::config::{Config, ConfigError};

/// Reads the settings as at the start: the file, with the command line on top.
pub type Reread = Box<dyn FnMut() -> Result<Config, ConfigError> + Send>;

/// The settings to go on with, on a host with `total` memory; `None`, and a line in the log, if the new ones can't
/// be taken over.
pub fn reload(old: &Config, total: Bytes, reread: &mut Reread) -> Option<Config> {
    let new = match reread().and_then(|config| config.validate_for(total).map(|()| config)) {
        Ok(new) => new,
        Err(error) => {
            warn!("going on with the settings before: {error}");
            return None;
        }
    };
    for (key, changes) in [
        ("directory", new.directory != old.directory),
        ("metrics", new.metrics != old.metrics),
        ("beside_others", new.beside_others != old.beside_others),
        // The others were told of it.
        ("budget", new.beside_others && new.budget != old.budget),
    ] {
        if changes {
            warn!("going on with the settings before: another `{key}` needs a restart, which no VM notices");
            return None;
        }
    }
    if new == *old {
        info!("the settings are read again; nothing has changed");
    }
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_taken_over_whole_or_not_at_all() {
        let old = Config::default();
        let with = |config: Config| {
            reload(&old, Bytes::gib(4), &mut (Box::new(move || Ok(config.clone())) as Reread))
        };
        let budget = Config { budget: Some(Bytes::gib(1)), ..Config::default() };
        assert_eq!(with(budget.clone()), Some(budget));
        assert_eq!(with(Config { budget: Some(Bytes::ZERO), ..Config::default() }), None);
        assert_eq!(with(Config { host_reserve: Bytes::gib(4), ..Config::default() }), None);
        assert_eq!(with(Config { directory: Some("/x".into()), ..Config::default() }), None);
        assert_eq!(with(Config { metrics: "[::1]:1".parse().ok(), ..Config::default() }), None);
        let beside = Config { beside_others: true, budget: Some(Bytes::gib(1)), ..Config::default() };
        assert_eq!(with(beside.clone()), None);
        let more = Config { budget: Some(Bytes::gib(2)), ..beside.clone() };
        assert_eq!(reload(&beside, Bytes::gib(4), &mut (Box::new(move || Ok(more.clone())) as Reread)), None);
        let bad = Box::new(|| Config::read(std::path::Path::new("/nowhere.toml")));
        assert_eq!(reload(&old, Bytes::gib(4), &mut (bad as Reread)), None);
    }
}
