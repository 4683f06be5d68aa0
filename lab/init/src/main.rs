//! The init of the lab: process 1 of its emulated hosts and of the guests inside them.
//!
//! Where a job lies in [`JOB`] this is an emulated host. Everywhere else it is a guest,
//! which does what its kernel's command line says (see [`guest`]).

mod capture;
mod devmem;
mod disk;
mod guest;
mod hostile;
mod load;
mod memory;
mod ports;
mod random;
mod show;
mod transfer;
mod vsock;

use std::path::Path;

use lab_init::job::JOB;
use lab_init::{host, system};

fn main() {
    if std::process::id() != 1 {
        std::process::exit(guest::worker());
    }
    if Path::new(JOB).exists() {
        host::main();
    }
    if let Err(error) = system::mount_all() {
        println!("guest-init: {error}");
    }
    guest::main()
}
