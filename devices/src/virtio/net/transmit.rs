//! Frames on their way from the guest (virtio 1.2, section 5.1.6.2).

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::backend::Backend;
use super::counters::{Counters, Direction};
use super::gate::Gate;
use super::{ETHERNET, HEADER, MOST_FRAME, TX};
use crate::virtio::device::{Active, Progress};
use crate::virtio::queue::{Budget, Chain, Faults, IoVectors, Verdict, serve};

/// What is sent in one event.
const BUDGET: Budget = Budget { chains: 64, bytes: 1 << 20 };

/// The way from the guest.
#[derive(Default)]
pub struct Transmitter {
    vectors: Option<IoVectors>,
    /// The backend takes nothing for now: it says when it does.
    waits: bool,
}

/// What became of one frame.
enum Sent {
    Passed,
    Dropped,
    Waits,
    Lost(io::Error),
}

impl Transmitter {
    /// A driver is there.
    pub fn activate(&mut self, active: &Active) {
        self.vectors = Some(IoVectors::new(Arc::clone(&active.memory)));
        self.waits = false;
    }

    /// The driver has gone.
    pub fn reset(&mut self) {
        self.vectors = None;
        self.waits = false;
    }

    /// Whether the backend is to say when it takes more.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Has the backend say when it takes more: there is something to send.
    pub fn wait(&mut self) {
        self.waits = true;
    }

    /// Sends frames of the driver, as many as one event may; drops them where there is no backend any more.
    ///
    /// # Errors
    /// The backend is of no more use.
    pub fn transmit(
        &mut self,
        active: &mut Active,
        mut backend: Option<&mut Backend>,
        faults: &mut Faults,
        counters: &Counters,
        gate: &mut Gate,
    ) -> Result<Progress, io::Error> {
        self.waits = false;
        let Some(mut vectors) = self.vectors.take() else { return Ok(Progress::Done) };
        let mut lost = None;
        let progress = serve(active, TX, faults, BUDGET, |memory, chain| {
            let len = usize::try_from(chain.len()).unwrap_or(usize::MAX);
            if !chain.writable().is_empty() || len < HEADER {
                return Verdict::Malformed;
            }
            let len = len - HEADER;
            let backend = backend.as_deref_mut().filter(|_| (ETHERNET..=MOST_FRAME).contains(&len));
            let sent = match backend {
                // The queue is looked at again when it opens.
                Some(_) if lost.is_none() && !gate.is_open(counters) => return Verdict::Later,
                Some(backend) if lost.is_none() => send(memory, chain, len, backend, &mut vectors),
                _ => Sent::Dropped,
            };
            if matches!(sent, Sent::Passed) {
                gate.passed(len);
            }
            match sent {
                Sent::Passed => counters.passed(Direction::Sent, len),
                Sent::Dropped => counters.dropped(Direction::Sent),
                Sent::Waits => {
                    self.waits = true;
                    return Verdict::Later;
                }
                Sent::Lost(error) => {
                    counters.dropped(Direction::Sent);
                    lost = Some(error);
                }
            }
            Verdict::Used(0)
        });
        self.vectors = Some(vectors);
        lost.map_or(Ok(progress), Err)
    }
}

fn send(
    memory: &GuestMemoryMmap,
    chain: &Chain,
    len: usize,
    backend: &mut Backend,
    vectors: &mut IoVectors,
) -> Sent {
    let mut header = [0; HEADER];
    let mut reader = chain.reader(memory);
    reader.read(&mut header);
    vectors.clear();
    if reader.vectors(len, vectors) < len {
        return Sent::Dropped;
    }
    let sent = match backend {
        Backend::Tap(tap) => tap.send(&header, vectors),
        Backend::Stream(stream) => stream.send(memory, chain, vectors, len),
    };
    match sent {
        Ok(()) => Sent::Passed,
        Err(error) => match error.raw_os_error() {
            _ if error.kind() == io::ErrorKind::WouldBlock => Sent::Waits,
            Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::EBADFD) => Sent::Lost(error),
            // A header that makes no sense, an interface that is down, no memory for it: the next may go.
            _ => Sent::Dropped,
        },
    }
}
