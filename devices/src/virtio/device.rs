//! What makes a virtio device, whatever transport carries it.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde_json::Value;
use vm_memory::GuestMemoryMmap;

use super::interrupt::Interrupt;
use super::queue::ActiveQueue;
use crate::sandbox::SandboxNeeds;
use crate::state::StateError;

/// What a device works on from DRIVER_OK until it is reset.
pub struct Active {
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The queues as the driver set them up, each with the interrupt that tells of its used buffers.
    /// One that the driver did not enable is not ready.
    pub queues: Vec<ActiveQueue>,
    /// Tells the driver that the configuration space has changed.
    pub config_interrupt: Interrupt,
    /// The features that both sides agreed on.
    pub features: u64,
}

/// What is left after a device has worked on a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// The queue is empty; the driver's next notification says when to look again.
    Done,
    /// The budget of one event is spent with buffers left: the transport comes
    /// back to this queue after the other events that wait.
    More,
    /// The driver has broken the protocol: the transport sets DEVICE_NEEDS_RESET
    /// (section 2.1.2), and no event of a queue comes until the driver resets.
    Broken,
}

/// A virtio device. Its methods are called with the transport's lock held:
/// queue and own events on the device's event loop, the rest on a vCPU's thread, as are events of
/// queues that are [`is_served_by_vcpu`](Self::is_served_by_vcpu).
pub trait VirtioDevice: Send {
    /// The device's number (virtio 1.2, section 5).
    fn device_id(&self) -> u32;

    /// The feature bits of this device type; the transport adds its own.
    fn features(&self) -> u64;

    /// The largest size of each queue, in the order of the specification.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what the driver may not write stays as it is.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The VM is about to run: the device's events are watched from now on. Threads that it needs are started
    /// here: later ones can't be, and earlier ones would be outside of the sandbox.
    ///
    /// # Errors
    /// There is no thread to be had.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The driver has set DRIVER_OK.
    fn activate(&mut self, active: &mut Active);

    /// The driver lets go of the device, or gives up on it; may come at any time. Nothing is in flight.
    fn reset(&mut self);

    /// Finishes, or gives up on, every chain that is being worked on elsewhere, in a thread or in the
    /// host's kernel, and gives it back: when this returns nobody touches guest memory for this device.
    /// Comes before a reset, and before the VM is paused, saved or ended; then no queue event and no own
    /// event comes until the device goes on.
    ///
    /// A device that has done with a chain when its event returns need not do anything, nor one that
    /// keeps a chain only to answer it later.
    fn drain(&mut self, _active: &mut Active) {}

    /// The VM is being paused: no event of the device's own comes until it goes on. What it owes the host,
    /// and would have done at one of them, it does now. Comes in any state.
    fn pause(&mut self) {}

    /// The driver has put buffers into queue `index`.
    ///
    /// Bounded work only: what does not fit in one event is left for the next ([`Progress::More`]).
    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress;

    /// Whether the vCPU that notifies queue `index` does the work on it at once, rather than wake
    /// the event loop: for short work whose driver waits for it anyway. The same for all its life.
    fn is_served_by_vcpu(&self, _index: usize) -> bool {
        false
    }

    /// File descriptors of the device's own that its event loop shall watch
    /// for reading (timers, requests from outside); fixed for its life.
    fn own_events(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// One of [`own_events`](Self::own_events), by its place there, is readable.
    /// `active` is `None` while no driver has set the device up, or once
    /// it has broken the protocol. The device reads the descriptor empty.
    fn own_event(&mut self, _index: usize, _active: Option<&mut Active>) {}

    /// What it needs of the sandbox while the guest runs; asked once, before that.
    fn sandbox_needs(&self) -> SandboxNeeds {
        SandboxNeeds::default()
    }

    /// What the device itself knows, beside the transport's registers and queues. It begins
    /// with its [`Version`](crate::state::Version).
    ///
    /// # Errors
    /// [`StateError::NotSaved`] for a device that has not learnt it.
    fn save(&self) -> Result<Value, StateError> {
        Err(StateError::NotSaved { device: self.device_id() })
    }

    /// Takes in what [`save`](Self::save) gave, instead of [`activate`](Self::activate).
    /// `active` is there where a driver had set the device up. Nothing in `state` is to be trusted.
    ///
    /// # Errors
    /// [`StateError`] says what is wrong with it; the device is of no use then.
    fn restore(&mut self, _state: Value, _active: Option<&mut Active>) -> Result<(), StateError> {
        Err(StateError::NotSaved { device: self.device_id() })
    }
}

/// Fills `data` with a device's configuration space from `offset` on, and with zeros past its end: the usual
/// [`VirtioDevice::read_config`].
pub fn read_part(config: &[u8], offset: u64, data: &mut [u8]) {
    let there = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    data.fill(0);
    for (byte, value) in data.iter_mut().zip(there) {
        *byte = *value;
    }
}
