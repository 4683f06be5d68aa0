//! The log on standard error.

use std::io;

use tracing_subscriber::EnvFilter;

#[derive(clap::Args)]
pub struct Options {
    /// Log more on standard error: -v for debug, -vv for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Options {
    /// Starts the log: `BALLAST_LOG` where it is set, else by `-v`, else from `info` on.
    pub fn start(&self) {
        let level = match self.verbose {
            0 => "info",
            1 => "debug",
            _ => "trace",
        };
        let filter = EnvFilter::try_from_env("BALLAST_LOG").unwrap_or_else(|_| EnvFilter::new(level));
        let log =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
        log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
    }
}
