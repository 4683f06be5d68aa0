//! How the transport asks for the guest's attention.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::saved::LineState;
use crate::virtio::device::Interrupt;

/// The interrupt line of one device with the registers that tell its reason.
pub(super) struct Line {
    /// Edge-triggered: one write is one interrupt.
    irq: EventFd,
    /// InterruptStatus (virtio 1.2, section 4.2.2).
    reasons: AtomicU32,
    /// ConfigGeneration (section 2.5.1).
    generation: AtomicU32,
    /// DEVICE_NEEDS_RESET is set (section 2.1).
    broken: AtomicBool,
    /// The driver has set DRIVER_OK, so it may be told of a needed reset (section 2.1.2).
    driver_ok: AtomicBool,
}

impl Line {
    pub(super) fn new(irq: EventFd) -> Self {
        Self {
            irq,
            reasons: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            broken: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
        }
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

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(super) fn set_driver_ok(&self) {
        self.driver_ok.store(true, Ordering::Release);
    }

    /// Back to the state after power-on; the generation moves on, as a driver
    /// that reads across the reset must notice.
    pub(super) fn reset(&self) {
        self.driver_ok.store(false, Ordering::Release);
        self.broken.store(false, Ordering::Release);
        self.reasons.store(0, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// DEVICE_NEEDS_RESET, told to a driver that listens (section 2.1.2).
    pub(super) fn needs_reset(&self) {
        self.broken.store(true, Ordering::Release);
        if self.driver_ok.load(Ordering::Acquire) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    pub(super) fn save(&self) -> LineState {
        let reasons = self.reasons.load(Ordering::Acquire);
        LineState { reasons, generation: self.generation(), broken: self.is_broken() }
    }

    /// Takes in what [`save`](Self::save) gave, and interrupts again where a reason stands: the
    /// edge may have been lost.
    pub(super) fn restore(&self, state: LineState, driver_ok: bool) {
        self.generation.store(state.generation, Ordering::Release);
        self.broken.store(state.broken, Ordering::Release);
        self.driver_ok.store(driver_ok, Ordering::Release);
        if state.reasons != 0 {
            self.raise(state.reasons);
        }
    }

    fn raise(&self, reason: u32) {
        self.reasons.fetch_or(reason, Ordering::AcqRel);
        // The one failure is a full counter, which is an interrupt already pending.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for Line {
    fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}
