//! The log on standard error.

use std::env;
use std::fmt::{self, Write};
use std::io;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;

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
    /// Starts the log: `BALLAST_LOG` where it is set, else by `-v`, else from `info` on.
    pub fn start(&self) {
        let level = match self.verbose {
            0 => "info",
            1 => "debug",
            _ => "trace",
        };
        let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new(level));
        standard_error::open();
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(LogWriter).with_target(false);
        // Its own errors would go where it could not write.
        let log = log.log_internal_errors(false);
        log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
    }

    /// Starts the log of a process that is one VM. Where nobody asked for more than
    /// the usual, it is one that holds no memory: filters and spans would cost each
    /// VM some tens of KiB.
    pub fn start_small(&self) {
        if self.verbose > 0 || env::var_os(VARIABLE).is_some() {
            return self.start();
        }
        standard_error::open();
        // Only a second call could fail.
        let _ = tracing::subscriber::set_global_default(Sentences);
    }
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
        let mut sentence = Sentence(String::new());
        event.record(&mut sentence);
        sentence::log(sentence.0);
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

/// An event's message, then its other fields.
struct Sentence(String);

impl Visit for Sentence {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = if field.name() == "message" {
            let fields = std::mem::take(&mut self.0);
            write!(self.0, "{value:?}{fields}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
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
                let mut sentence = Sentence(String::new());
                event.record(&mut sentence);
                SAID.lock().unwrap().push(sentence.0);
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
            tracing::info!("hello {}", "you");
        });
        assert_eq!(*SAID.lock().unwrap(), ["the disk is full count=3", "hello you"]);
    }
}
