//! `ballast balancer`.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::balancer::daemon::{self, Config, ConfigError, DEFAULT_FILE, DaemonError, HOST_LOCK};
use api::units::Bytes;

use crate::failure::Failure;
use crate::{client, duration, output};

/// Move memory between this host's VMs, by what their guests need
#[derive(Clone, clap::Args)]
#[command(after_help = "\
It finds VMs by their sockets, those that come later too, and moves the memory of those whose
--memory has min or max. Each change is one line in the log, with its reason; `ballast why VM` has
the last ones. It keeps nothing but what it promised to VMs that are about to start: stop it, kill
it, start it again at any time; VMs keep what they have meanwhile, and whom it paused stays paused.
SIGHUP reads the settings anew; where they are wrong, those before stay.

Exit codes: 0 it was stopped, 1 it could not start, 2 the settings make no sense, 4 its directory was
removed or taken over while it ran.

Examples:
  ballast balancer
  ballast balancer --host-reserve 4G --metrics 127.0.0.1:9090
  ballast balancer --budget 2G --interval 500ms
  ballast balancer --budget 8G --beside-others
  ballast balancer --check balancer.toml

Settings are TOML, in the file that --config names or else in /etc/ballast/balancer.toml where that
exists; what is given here goes before them:
  budget = \"2G\"
  host_reserve = \"512M\"
  interval = \"1s\"
  metrics = \"127.0.0.1:9090\"
  last_resort = \"advise\"    # or \"pause\": where nothing else helps, VMs of little weight, for a while
  [policy]
  pool_percent = 3

VMs of other VMMs (qemu, firecracker, cloud-hypervisor) are named there too, by their sockets:
  [[vms]]
  driver = \"qemu\"
  sockets = \"/run/qemu/*.qmp\"
  memory = \"1G,min=256M\"")]
pub struct Args {
    /// Read settings from this file [default: /etc/ballast/balancer.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say everything that is wrong with a settings file, and end
    #[arg(long, value_name = "FILE", num_args = 0..=1, exclusive = true)]
    check: Option<Option<PathBuf>>,
    /// What the host keeps for itself and other programs [default: 512M]
    #[arg(long, value_name = "SIZE", conflicts_with = "budget")]
    host_reserve: Option<Bytes>,
    /// What all VMs together may hold, instead of all but the reserve
    #[arg(long, value_name = "SIZE")]
    budget: Option<Bytes>,
    /// Share this host with other balancers, each of which has a --budget of its own
    ///
    /// Without it a second balancer of a host does not start, whatever its directory or user: both would
    /// promise the same memory.
    #[arg(long, conflicts_with = "host_reserve")]
    beside_others: bool,
    /// How often to look [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    interval: Option<Duration>,
    /// Serve /metrics for Prometheus on this address too
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

impl Args {
    /// The settings with what the command line says on top; read anew each time.
    fn config(&self) -> Result<Config, ConfigError> {
        let mut config = read(self.config.as_deref(), Path::new(DEFAULT_FILE))?;
        if let Some(reserve) = self.host_reserve {
            // A reserve that is asked for here goes before a budget from the file.
            (config.host_reserve, config.budget) = (reserve, None);
        }
        config.budget = self.budget.or(config.budget);
        config.beside_others |= self.beside_others;
        config.host_lock = Some(HOST_LOCK.to_owned());
        config.interval = self.interval.unwrap_or(config.interval);
        config.metrics = self.metrics.or(config.metrics);
        Ok(config)
    }
}

/// What `file` says, or else `default` where that exists. One that is there and can't be read is an error.
fn read(file: Option<&Path>, default: &Path) -> Result<Config, ConfigError> {
    let Some(file) = file else {
        return match Config::read(default) {
            Err(ConfigError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Ok(Config::default())
            }
            read => read,
        };
    };
    Config::read(file)
}

pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(file) = &args.check {
        return check(file.as_deref().unwrap_or(Path::new(DEFAULT_FILE)));
    }
    let config = args.config().map_err(DaemonError::from)?;
    let args = args.clone();
    client::block_on(async {
        let stop = daemon::signals::stop_signal().map_err(Failure::new)?;
        Ok(daemon::run_with(config, move || args.config(), stop).await?)
    })
}

fn check(file: &Path) -> Result<(), Failure> {
    let config = Config::read(file).map_err(DaemonError::from)?;
    config.validate().map_err(DaemonError::from)?;
    output::text(&format!("{} is in order\n", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_read_are_not_taken_for_none() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing.toml");
        assert_eq!(read(None, &missing).unwrap(), Config::default());
        assert!(read(Some(&missing), &missing).is_err());
        let error = read(None, directory.path()).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    }
}
