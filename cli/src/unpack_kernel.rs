//! `ballast unpack-kernel`, which `ballast run` runs for one bzImage ([`image::helper`]).

use std::process::ExitCode;

/// Unpack the kernel in the bzImage on standard input to standard output
#[derive(clap::Args)]
pub struct Args {
    /// Bytes of the file
    size: u64,
    /// Bytes of memory that the kernel takes to unpack itself
    init_size: u64,
}

pub fn run(args: &Args) -> ExitCode {
    ExitCode::from(image::helper::run(args.size, args.init_size))
}
