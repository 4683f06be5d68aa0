//! `ballast vsock`.

use std::time::Duration;

use crate::client;
use crate::failure::Failure;
use crate::relay::{Keyboard, converse};

/// How long the guest may take to accept.
const PATIENCE: Duration = Duration::from_secs(10);

/// Speak to a program in a guest by standard input and output, without a network
#[derive(clap::Args)]
#[command(after_help = "\
The VM must have been started with --vsock, and the program listen at AF_VSOCK. The guest's module is
vmw_vsock_virtio_transport.

Examples:
  ballast vsock web 5000 <request >answer
  ssh -o ProxyCommand='ballast vsock web 22' me@web

In ~/.ssh/config, for all VMs as `ssh NAME.vm`:
  Host *.vm
    ProxyCommand ballast vsock $(basename %h .vm) 22")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
    /// The port of the guest
    port: u32,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(&args.name)?.with_timeout(PATIENCE);
    let connected = client::block_on(async { Ok(vm.vsock(args.port).await?) })?;
    let stop = api::signals::stop_flag();
    converse(connected, &mut Some(Keyboard { escape: None }), stop).map(drop)
}
