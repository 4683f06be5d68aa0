//! `ballast stop`.

use std::time::Duration;

use api::client::Client;
use tokio::time::{Instant, sleep};

use crate::client::{self, Error};
use crate::duration;
use crate::failure::Failure;
use crate::service;

/// How often to look whether the VM has gone.
const LOOK: Duration = Duration::from_millis(50);

/// Switch a VM off by its power button, and wait until it is off
#[derive(clap::Args)]
#[command(after_help = "\
The guest must listen to its power button: one with systemd or acpid does.

Examples:
  ballast stop web
  ballast stop web --timeout 2m
  ballast stop web --force")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
    /// End the VM at once, whatever its guest does: as pulling the plug
    #[arg(long)]
    force: bool,
    /// How long the guest may take
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = match client::named(&args.name) {
        Ok(vm) => vm,
        Err(_) if service::stop_between_starts(&args.name)? => return Ok(()),
        Err(error) => return Err(error),
    };
    client::block_on(async {
        let asked = if args.force { vm.shutdown().await } else { vm.power_button().await };
        match asked {
            // It ended before it could say so.
            Ok(()) | Err(Error::HungUp { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if gone_within(&mut vm, args.timeout).await {
            return Ok(());
        }
        Err(Failure::new(if args.force {
            format!("{} was told to end and has not within {:?}", args.name, args.timeout)
        } else {
            format!(
                "the guest of {name} did not switch off within {timeout:?}: it may not listen to its power \
                 button, or need longer; `ballast stop --force {name}` ends it at once",
                name = args.name,
                timeout = args.timeout,
            )
        }))
    })
}

async fn gone_within(vm: &mut Client, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        if matches!(vm.status().await, Err(Error::NoSuchVm { .. })) {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        sleep(LOOK).await;
    }
}
