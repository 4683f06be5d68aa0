//! Time limits for a peer that is waited for.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// It only waits.
const STACK: usize = 64 << 10;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// Nothing.
    Idle,
    /// An answer that is to be there by then.
    Until(Instant),
    /// Nothing any more.
    Over,
}

/// Cuts a connection whose peer takes too long. Whoever waits for the peer then learns that it has gone.
#[derive(Debug)]
pub(super) struct Watchdog {
    socket: UnixStream,
    patience: Duration,
    watch: Mutex<Watch>,
    changed: Condvar,
}

impl Watchdog {
    pub(super) fn new(socket: UnixStream, patience: Duration) -> Self {
        Self { socket, patience, watch: Mutex::new(Watch::Idle), changed: Condvar::new() }
    }

    /// Watches on a thread of its own from now on.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<()> {
        *self.watch.lock() = Watch::Idle;
        let watchdog = Arc::clone(self);
        let thread = thread::Builder::new().name("vhost-user".to_owned()).stack_size(STACK);
        thread.spawn(move || watchdog.serve()).map(drop)
    }

    /// Watches on this thread, until the connection's [`end`](Self::end).
    pub(super) fn serve(&self) {
        let mut watch = self.watch.lock();
        loop {
            match *watch {
                Watch::Over => return,
                Watch::Idle => self.changed.wait(&mut watch),
                Watch::Until(deadline) => {
                    let waited = self.changed.wait_until(&mut watch, deadline);
                    if waited.timed_out() && *watch == Watch::Until(deadline) {
                        self.cut();
                        *watch = Watch::Idle;
                    }
                }
            }
        }
    }

    /// Does something that takes as long as the peer's patience at most.
    pub(super) fn within<T>(&self, exchange: impl FnOnce() -> T) -> T {
        *self.watch.lock() = Watch::Until(Instant::now() + self.patience);
        self.changed.notify_one();
        let result = exchange();
        *self.watch.lock() = Watch::Idle;
        result
    }

    /// Nothing is watched any more. Once the watchdog serves no longer it can be started again.
    pub(super) fn end(&self) {
        *self.watch.lock() = Watch::Over;
        self.changed.notify_one();
    }

    fn cut(&self) {
        // One that is cut already is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Whether the peer is there, and has sent nothing.
    pub(super) fn is_quiet(&self) -> bool {
        let mut byte = 0u8;
        // SAFETY: the kernel writes one byte at most to where there is room for one.
        let read = unsafe {
            let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
            libc::recv(self.socket.as_raw_fd(), (&raw mut byte).cast(), 1, flags)
        };
        read < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn who_waits_too_long_is_told_and_who_does_not_is_let_be() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let watchdog = Arc::new(Watchdog::new(ours.try_clone().unwrap(), Duration::from_millis(50)));
        watchdog.start().unwrap();
        assert_eq!(watchdog.within(|| 7), 7);
        thread::sleep(Duration::from_millis(100));
        assert!(watchdog.is_quiet(), "nobody waited then");
        assert_eq!(watchdog.within(|| (&ours).read(&mut [0]).unwrap()), 0);
        assert!(!watchdog.is_quiet());
        watchdog.end();
        drop(theirs);
    }
}
