//! `ballast read-disk`, which `ballast run` runs for a disk that it boots from ([`image::disk::helper`]).

use std::process::ExitCode;

/// Look for the kernel on the disk that is served on standard input
#[derive(clap::Args)]
pub struct Args {
    /// Bytes of the disk
    size: u64,
}

pub fn run(args: &Args) -> ExitCode {
    ExitCode::from(image::disk::helper::run(args.size))
}
