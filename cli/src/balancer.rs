//! `ballast balancer`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ::balancer::daemon::{self, Config, DaemonError};
use balloon::units::Bytes;

use crate::failure::Failure;
use crate::{client, duration};

/// Move memory between this host's VMs, by what their guests need
#[derive(clap::Args)]
#[command(after_help = "\
It finds VMs by their sockets, those that come later too, and moves the memory of those whose
--memory has min or max. Each change is one line in the log, with its reason. It keeps nothing:
stop it, kill it, start it again at any time; VMs keep what they have meanwhile.

Examples:
  ballast balancer
  ballast balancer --host-reserve 4G --metrics 127.0.0.1:9090
  ballast balancer --budget 2G --interval 500ms

The file that --config names is TOML; what is given here goes before it:
  budget = \"2G\"
  host_reserve = \"512M\"
  interval = \"1s\"
  metrics = \"127.0.0.1:9090\"

VMs of other VMMs (qemu, firecracker, cloud-hypervisor) are named there too, by their sockets:
  [[vms]]
  driver = \"qemu\"
  sockets = \"/run/qemu/*.qmp\"
  memory = \"1G,min=256M\"")]
pub struct Args {
    /// Read settings from this file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What the host keeps for itself and other programs [default: 512M]
    #[arg(long, value_name = "SIZE", conflicts_with = "budget")]
    host_reserve: Option<Bytes>,
    /// What all VMs together may hold, instead of all but the reserve
    #[arg(long, value_name = "SIZE")]
    budget: Option<Bytes>,
    /// How often to look [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    interval: Option<Duration>,
    /// Serve /metrics for Prometheus on this address too
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

impl Args {
    fn config(&self) -> Result<Config, DaemonError> {
        let mut config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        if let Some(reserve) = self.host_reserve {
            // A reserve that is asked for here goes before a budget from the file.
            (config.host_reserve, config.budget) = (reserve, None);
        }
        config.budget = self.budget.or(config.budget);
        config.interval = self.interval.unwrap_or(config.interval);
        config.metrics = self.metrics.or(config.metrics);
        Ok(config)
    }
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let config = args.config()?;
    client::block_on(async {
        let stop = daemon::stop_signal().map_err(Failure::new)?;
        Ok(daemon::run(config, stop).await?)
    })
}
