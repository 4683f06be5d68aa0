//! `ballast pause`.

use crate::client;
use crate::failure::Failure;

/// Stop a VM's vCPUs; its memory stays
#[derive(clap::Args)]
#[command(after_help = "\
A VM that the balancer paused, as memory ran out, is yours from then on: it runs again when you
resume it, and not when there is room. `ballast ps` tells who paused one.")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(&args.name)?;
    client::block_on(async { Ok(vm.pause().await?) })
}
