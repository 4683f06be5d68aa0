//! The one interrupt line of a device behind memory-mapped registers.

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::interrupt::{Deliver, Source};

/// The line with the register that tells its reason.
pub(super) struct Line {
    /// Edge-triggered: one write is one interrupt.
    irq: EventFd,
    /// InterruptStatus (virtio 1.2, section 4.2.2).
    reasons: AtomicU32,
}

impl Line {
    pub(super) fn new(irq: EventFd) -> Self {
        Self { irq, reasons: AtomicU32::new(0) }
    }

    /// What the driver reads as InterruptStatus. It takes the used buffers' bit with it: their
    /// acknowledgement says nothing more then, and need not reach this process (`INTERRUPT_ACK`).
    /// Buffers that are used between the two set the bit anew, and interrupt anew.
    pub(super) fn read_reasons(&self) -> u32 {
        self.reasons.fetch_and(!VIRTIO_MMIO_INT_VRING, Ordering::AcqRel)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.reasons.fetch_and(!(reasons & !VIRTIO_MMIO_INT_VRING), Ordering::AcqRel);
    }

    pub(super) fn save(&self) -> u32 {
        self.reasons.load(Ordering::Acquire)
    }

    /// Takes in what [`save`](Self::save) gave, and interrupts again where a reason stands: the
    /// edge may have been lost.
    pub(super) fn restore(&self, reasons: u32) {
        if reasons != 0 {
            self.raise(reasons);
        }
    }

    fn raise(&self, reason: u32) {
        self.reasons.fetch_or(reason, Ordering::AcqRel);
        // The one failure is a full counter, which is an interrupt already pending.
        let _ = self.irq.write(1);
    }
}

impl Deliver for Line {
    fn deliver(&self, source: Source) {
        self.raise(match source {
            Source::Queue(_) => VIRTIO_MMIO_INT_VRING,
            Source::Config => VIRTIO_MMIO_INT_CONFIG,
        });
    }

    fn reset(&self) {
        self.reasons.store(0, Ordering::Release);
    }
}
