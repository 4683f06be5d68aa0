//! `ballast pause`.

use crate::client;
use crate::failure::Failure;

/// Stop a VM's vCPUs; its memory stays
#[derive(clap::Args)]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(&args.name)?;
    client::block_on(async { Ok(vm.pause().await?) })
}
