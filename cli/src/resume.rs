//! `ballast resume`.

use crate::client;
use crate::failure::Failure;

/// Let a paused VM run on
#[derive(clap::Args)]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(&args.name)?;
    client::block_on(async { Ok(vm.resume().await?) })
}
