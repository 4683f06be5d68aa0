//! The host's side of virtio-mem: what is asked of the guest, and how far it got.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use api::status::{DriverState, PlugCounters};
use api::units::Bytes;

/// What the device and its handles share; held for moments only.
pub(super) struct State {
    pub(super) requested: Bytes,
    pub(super) plugged: Bytes,
    pub(super) driver: DriverState,
    pub(super) counters: PlugCounters,
}

pub(super) struct Shared {
    /// The most that can be requested.
    pub(super) most: Bytes,
    pub(super) block: Bytes,
    /// Tells the device that the request has changed.
    pub(super) wake: EventFd,
    /// Tells whoever steers that the guest has moved.
    pub(super) moved: EventFd,
    state: Mutex<State>,
}

impl Shared {
    pub(super) fn new(most: Bytes, block: Bytes) -> io::Result<Self> {
        let state = State {
            requested: Bytes::ZERO,
            plugged: Bytes::ZERO,
            driver: DriverState::Absent,
            counters: PlugCounters::default(),
        };
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self { most, block, wake: event()?, moved: event()?, state: Mutex::new(state) })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn tell_moved(&self) {
        // The one failure is a full counter, which is news already pending.
        let _ = self.moved.write(1);
    }
}

/// Asks the guest to plug or unplug memory, from any thread.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl Handle {
    /// Asks the guest to have `amount` plugged, in whole blocks and at most [`most`](Self::most);
    /// a guest without a driver will be asked when one comes.
    pub fn request(&self, amount: Bytes) {
        let amount = self.whole_blocks(amount);
        let changed = {
            let mut state = self.0.state();
            std::mem::replace(&mut state.requested, amount) != amount
        };
        if changed {
            // The one failure is a full counter, which is a wake-up already pending.
            let _ = self.0.wake.write(1);
        }
    }

    /// The largest number of whole blocks not above `amount` and [`most`](Self::most).
    pub fn whole_blocks(&self, amount: Bytes) -> Bytes {
        let amount = amount.min(self.0.most);
        Bytes(amount.0.checked_div(self.0.block.0).unwrap_or(0).saturating_mul(self.0.block.0))
    }

    /// What the guest was last asked to have plugged.
    pub fn requested(&self) -> Bytes {
        self.0.state().requested
    }

    /// What it has plugged, which is the device's own count, not the guest's word.
    pub fn plugged(&self) -> Bytes {
        self.0.state().plugged
    }

    /// The most that can be requested.
    pub fn most(&self) -> Bytes {
        self.0.most
    }

    /// What memory is plugged and unplugged in.
    pub fn block(&self) -> Bytes {
        self.0.block
    }

    /// How the driver is doing.
    pub fn driver(&self) -> DriverState {
        self.0.state().driver
    }

    /// What the device has counted since it was made.
    pub fn counters(&self) -> PlugCounters {
        self.0.state().counters
    }

    /// Readable each time the guest has plugged or unplugged, or its driver has come or gone.
    pub fn moved(&self) -> &EventFd {
        &self.0.moved
    }
}
