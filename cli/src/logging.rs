//! The log, on standard error or in systemd's journal.

use std::env;
use std::io;

use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::entry::Entry;
use crate::journal;
use crate::sentence;
use crate::standard_error::{self, LogWriter};

/// The variable that says what is logged, as tracing's filters are written.
const VARIABLE: &str = "BALLAST_LOG";

#[derive(clap::Args)]
pub struct Options {
    /// Log more on standard error: -v for debug, -vv for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Options {
    /// Starts the log: `BALLAST_LOG` where it is set, else by `-v`, else from `info` on. It goes to systemd's journal
    /// where that reads standard error.
    pub fn start(&self) {
        self.start_of(None);
    }

    fn start_of(&self, vm: Option<&str>) {
        let level = match self.verbose {
            0 => "info",
            1 => "debug",
            _ => "trace",
        };
        standard_error::open();
        journal::open(vm);
        let filter = filter_from_environment().unwrap_or_else(|| EnvFilter::new(level));
        if let Some(journal) = journal::opened() {
            return tracing_subscriber::registry().with(filter).with(journal).init();
        }
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(LogWriter).with_target(false);
        // Its own errors would go where it could not write.
        let log = log.log_internal_errors(false);
        log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
    }

    /// Starts the log of a process that is one VM. Where nobody asked for more than
    /// the usual, it is one that holds no memory: filters and spans would cost each
    /// VM some tens of KiB.
    pub fn start_small(&self, vm: Option<&str>) {
        if self.verbose > 0 || env::var_os(VARIABLE).is_some() {
            return self.start_of(vm);
        }
        standard_error::open();
        journal::open(vm);
        // Only a second call could fail.
        let _ = tracing::subscriber::set_global_default(Sentences);
    }
}

/// What [`VARIABLE`] says. What can't be read of it is told: whoever has set it waits for something.
fn filter_from_environment() -> Option<EnvFilter> {
    let told = env::var_os(VARIABLE)?;
    let filter = told.to_str().map(EnvFilter::try_new);
    let why = match filter {
        Some(Ok(filter)) => return Some(filter),
        Some(Err(error)) => error.to_string(),
        None => "it is no text".to_owned(),
    };
    sentence::say(format_args!(
        "{VARIABLE}={} is left aside: {why}; write a level (error, warn, info, debug, trace) or pairs such as \
         balancer=debug,vmm=info",
        told.display()
    ));
    None
}

/// Events from `info` on as sentences; nothing else.
struct Sentences;

impl Subscriber for Sentences {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= LevelFilter::INFO
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }

    fn event(&self, event: &Event<'_>) {
        sentence::log(*event.metadata().level(), &Entry::of(event));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // No span is enabled; an identifier is owed all the same, and 0 is none.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_from_info_on_become_sentences() {
        use std::sync::Mutex;

        static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
        /// The same subscriber with ears.
        struct Heard;
        impl Subscriber for Heard {
            fn enabled(&self, metadata: &Metadata<'_>) -> bool {
                Sentences.enabled(metadata)
            }
            fn event(&self, event: &Event<'_>) {
                SAID.lock().unwrap().push(Entry::of(event).sentence());
            }
            fn new_span(&self, span: &Attributes<'_>) -> Id {
                Sentences.new_span(span)
            }
            fn record(&self, _: &Id, _: &Record<'_>) {}
            fn record_follows_from(&self, _: &Id, _: &Id) {}
            fn enter(&self, _: &Id) {}
            fn exit(&self, _: &Id) {}
        }
        tracing::subscriber::with_default(Heard, || {
            tracing::debug!("not this");
            tracing::warn!(count = 3, "the disk is full");
            tracing::info!(event = "greeted", vm = "web", "hello {}", "you");
        });
        assert_eq!(*SAID.lock().unwrap(), ["the disk is full count=3", "hello you"]);
    }
}
