//! `ballast completions`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::failure::Failure;
use crate::output;

/// Print a shell's completions for ballast
#[derive(clap::Args)]
#[command(after_help = "Example:\n  ballast completions bash > /etc/bash_completion.d/ballast")]
pub struct Args {
    /// The shell they are for
    shell: Shell,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "ballast", &mut script);
    output::text(&String::from_utf8_lossy(&script))
}
