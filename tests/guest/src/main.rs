//! The init of the lab: process 1 of its emulated hosts and of the guests inside them.
//!
//! Where a job lies in [`host::JOB`] this is an emulated host: it runs the
//! job's program and hands the outcome out. Everywhere else it is a guest,
//! which does what its kernel's command line says (see [`guest`]).

mod devmem;
mod guest;
mod host;
mod hostile;
mod load;
mod memory;
mod modules;
mod ports;
mod random;
mod show;
mod system;

use std::path::Path;

fn main() {
    if std::process::id() != 1 {
        std::process::exit(guest::worker());
    }
    if let Err(error) = system::mount_all() {
        println!("guest-init: {error}");
    }
    if Path::new(host::JOB).exists() { host::main() } else { guest::main() }
}
