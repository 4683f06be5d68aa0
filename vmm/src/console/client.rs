//! The client of a console's socket: one at a time, both ways.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use devices::platform::serial::Port;
use parking_lot::{Mutex, MutexGuard};
use rustix::net::RecvFlags;

/// Who is connected, for the thread that writes to it and the event loop that reads from it.
#[derive(Default)]
pub(super) struct Client(Mutex<Option<Arc<UnixStream>>>);

impl Client {
    /// Who is connected now.
    pub(super) fn current(&self) -> Option<Arc<UnixStream>> {
        self.lock().clone()
    }

    /// Takes `stream` in unless somebody is there, and returns whether it did.
    pub(super) fn replace(&self, stream: UnixStream, port: &Port) -> bool {
        let mut client = self.lock();
        if client.as_ref().is_some_and(|client| !has_gone(client)) {
            return false;
        }
        if let Some(gone) = client.replace(Arc::new(stream)) {
            release(&gone);
        }
        port.reader_came();
        true
    }

    /// Lets `stream` go, unless another one has taken its place.
    pub(super) fn leave(&self, stream: &Arc<UnixStream>, port: &Port) {
        let mut client = self.lock();
        if client.as_ref().is_some_and(|client| Arc::ptr_eq(client, stream)) {
            *client = None;
            release(stream);
            port.reader_left();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.0.lock()
    }
}

/// Ends a write to `stream` that waits.
fn release(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

/// Reads without waiting, from a stream that whoever writes to it waits for.
pub(super) fn read(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let (count, _) = rustix::net::recv(stream, buffer, RecvFlags::DONTWAIT)?;
    Ok(count)
}

/// Whether the other end of `stream` is closed, both ways.
pub(super) fn has_gone(stream: &UnixStream) -> bool {
    let mut end = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one whole `pollfd`, as the call is told; with no time to wait it returns at once.
    let found = unsafe { libc::poll(&mut end, 1, 0) };
    found == 1 && end.revents & libc::POLLHUP != 0
}
