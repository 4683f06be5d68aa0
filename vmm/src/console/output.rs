//! A thread that brings the port's output to its reader, and waits for that.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use devices::platform::serial::{CHUNK, Port};

use super::client::Client;

/// How long a file or device is left alone that refuses output: space may come.
const RETRY: Duration = Duration::from_secs(1);

/// Where output goes.
pub(super) enum Sink {
    /// A terminal, a pipe or a file.
    File(File),
    /// Whoever is connected.
    Client(Arc<Client>),
}

/// Brings output to `sink` until nothing more comes.
pub(super) fn bring(port: &Port, sink: &Sink) {
    // More than a chunk, as a mark may be longer. What a thread allocates has a heap of its own.
    let mut chunk = Vec::with_capacity(2 * CHUNK);
    let mut refuses = false;
    while port.next_output(&mut chunk) {
        match sink {
            Sink::File(file) => refuses = to_file(port, file, &chunk, refuses),
            Sink::Client(client) => to_client(port, client, &chunk),
        }
    }
}

/// Returns whether the file refuses output; `refused` is whether it did before.
fn to_file(port: &Port, mut file: &File, chunk: &[u8], refused: bool) -> bool {
    let error = match file.write(chunk) {
        Ok(0) => ErrorKind::WriteZero.into(),
        Ok(count) => {
            port.written(count);
            return false;
        }
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::Interrupted => port.not_written(),
        // Whoever started this process shares it with others, and has set it so.
        ErrorKind::WouldBlock => {
            wait_until_writable(file);
            port.not_written();
        }
        ErrorKind::BrokenPipe => {
            tracing::debug!("nobody reads the console's output any more: it is lost from now on");
            port.reader_gone();
        }
        _ => {
            if !refused {
                tracing::warn!("the console's output can't be written: {error}; it is tried again");
            }
            port.refused(RETRY);
            return true;
        }
    }
    refused
}

fn to_client(port: &Port, client: &Client, chunk: &[u8]) {
    let Some(stream) = client.current() else { return port.not_written() };
    match (&*stream).write(chunk) {
        Ok(count) => port.written(count),
        Err(error) => {
            port.not_written();
            if error.kind() != ErrorKind::Interrupted {
                client.leave(&stream, port);
            }
        }
    }
}

fn wait_until_writable(file: &File) {
    let mut end = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one whole `pollfd`, as the call is told.
    if unsafe { libc::poll(&mut end, 1, -1) } < 0 {
        tracing::trace!("waiting for the console's reader: {}", io::Error::last_os_error());
    }
}
