//! systemd's journal, which takes a log with fields: `BALLAST_VM` and `BALLAST_EVENT` beside what is usual
//! (systemd.journal-fields(7), and the native protocol as systemd documents it).
//!
//! `tracing-journald` has a registry of spans behind it, which would cost each VM some tens of KiB. This is a
//! message of a few lines.

use std::env;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::OnceLock;

use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::entry::Entry;
use crate::sentence;

/// Where the journal takes messages.
const SOCKET: &str = "/run/systemd/journal/socket";

/// Which file the journal has made standard error of a service: its device and inode (systemd.exec(5)).
const VARIABLE: &str = "JOURNAL_STREAM";

/// The longest message, in bytes: any longer than a datagram would go by another way.
const LONGEST_MESSAGE: usize = 32 << 10;

static JOURNAL: OnceLock<Journal> = OnceLock::new();

/// A way to the journal.
pub struct Journal {
    socket: UnixDatagram,
    /// The VM that this process is.
    vm: Option<String>,
}

/// Finds the way to the journal, where standard error leads there, for the log of a process that is the VM `vm`:
/// before a sandbox takes the way away.
pub fn open(vm: Option<&str>) {
    if !is_of_service() {
        return;
    }
    // Standard error leads there as well, without fields.
    if let Ok(socket) = connect(Path::new(SOCKET)) {
        let _ = JOURNAL.set(Journal { socket, vm: vm.map(str::to_owned) });
    }
}

/// The way to the journal, where [`open`] has found one.
pub fn opened() -> Option<&'static Journal> {
    JOURNAL.get()
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(path)?;
    Ok(socket)
}

/// Whether standard error is what the service manager has connected with the journal: somebody in between may have put
/// another file there, and wants to have it all.
fn is_of_service() -> bool {
    let Some(stream) = env::var_os(VARIABLE) else { return false };
    let errors = format!("/proc/self/fd/{}", io::stderr().as_raw_fd());
    fs::metadata(errors).is_ok_and(|file| stream == *format!("{}:{}", file.dev(), file.ino()))
}

impl Journal {
    /// Hands an entry over, if the journal takes it at once.
    pub fn send(&self, level: Level, entry: &Entry) -> bool {
        self.socket.send(&message(level, entry, self.vm.as_deref())).is_ok()
    }
}

/// An entry's bytes in the journal's own protocol.
fn message(level: Level, entry: &Entry, vm: Option<&str>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let said = entry.sentence();
    let end = (0..=LONGEST_MESSAGE.min(said.len())).rev().find(|end| said.is_char_boundary(*end));
    field(&mut bytes, "MESSAGE", end.and_then(|end| said.get(..end)).unwrap_or_default());
    field(&mut bytes, "PRIORITY", priority(level));
    field(&mut bytes, "SYSLOG_IDENTIFIER", "ballast");
    for (name, value) in [("BALLAST_VM", entry.vm().or(vm)), ("BALLAST_EVENT", entry.event())] {
        if let Some(value) = value {
            field(&mut bytes, name, value);
        }
    }
    bytes
}

/// As syslog(3) counts.
const fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    }
}

/// A value of several lines has its length before it: a line of it can't pass for a field.
fn field(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        bytes.push(b'\n');
        bytes.extend_from_slice(&u64::try_from(value.len()).unwrap_or(u64::MAX).to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

/// The log of a process that is not small.
impl<S: Subscriber> Layer<S> for &'static Journal {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        // Standard error leads there as well, and counts what it does not take either.
        sentence::log_to(self, *event.metadata().level(), &Entry::of(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_its_fields() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let daemon = UnixDatagram::bind(&path).expect("a socket");
        let journal = Journal { socket: connect(&path).expect("it listens"), vm: Some("web".to_owned()) };
        let heard = |entry: &Entry| {
            assert!(journal.send(Level::WARN, entry));
            let mut bytes = [0; 1024];
            let length = daemon.recv(&mut bytes).expect("it was sent");
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        assert_eq!(
            heard(&Entry::new("the disk is full").of_kind("disk-failed")),
            "MESSAGE=the disk is full\nPRIORITY=4\nSYSLOG_IDENTIFIER=ballast\nBALLAST_VM=web\n\
             BALLAST_EVENT=disk-failed\n"
        );
        // No word of anybody's becomes a field.
        assert!(
            heard(&Entry::new("a\nBALLAST_VM=db"))
                .starts_with("MESSAGE\n\u{f}\0\0\0\0\0\0\0a\nBALLAST_VM=db\nPRIORITY=4\n")
        );
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let bytes = message(Level::INFO, &Entry::new("ä".repeat(LONGEST_MESSAGE)), None);
        let text = String::from_utf8(bytes).expect("whole characters");
        assert_eq!(text.find('\n'), Some("MESSAGE=".len() + LONGEST_MESSAGE));
    }
}
