//! One entry of the log.

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};

/// An event's message and fields. `vm` and `event` are for whoever looks for them: which VM, and what befell it.
#[derive(Default)]
pub struct Entry {
    message: String,
    others: String,
    vm: Option<String>,
    event: Option<String>,
}

impl Entry {
    /// A sentence without fields.
    pub fn new(message: impl ToString) -> Self {
        Self { message: message.to_string(), ..Self::default() }
    }

    /// The same as an event of this kind.
    #[must_use]
    pub fn of_kind(mut self, kind: &str) -> Self {
        self.event = Some(kind.to_owned());
        self
    }

    /// What was traced.
    pub fn of(event: &tracing::Event<'_>) -> Self {
        let mut entry = Self::default();
        event.record(&mut entry);
        entry
    }

    /// The message, then its fields but for those that have a place of their own.
    pub fn sentence(&self) -> String {
        format!("{}{}", self.message, self.others)
    }

    /// Which VM it is about.
    pub fn vm(&self) -> Option<&str> {
        self.vm.as_deref()
    }

    /// What befell it.
    pub fn event(&self) -> Option<&str> {
        self.event.as_deref()
    }
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "vm" => self.vm = Some(value.to_owned()),
            "event" => self.event = Some(value.to_owned()),
            _ => self.record_debug(field, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.others, " {}={value:?}", field.name())
        };
    }
}
