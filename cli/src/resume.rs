//! `ballast resume`.

use crate::client;
use crate::failure::Failure;

/// Let a paused VM run on
#[derive(clap::Args)]
#[command(after_help = "\
This also ends a pause of the balancer's, which would resume the VM only when there is room for it.")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(&args.name)?;
    client::block_on(async { Ok(vm.resume().await?) })
}
