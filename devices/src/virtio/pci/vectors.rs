//! How a device behind PCI asks for the guest's attention: by MSI-X vectors, or by nothing but its
//! ISR status.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::pci::MsiVectors;
use crate::virtio::interrupt::{Deliver, Source};

/// VIRTIO_MSI_NO_VECTOR (virtio 1.2, section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

// ISR status (section 4.1.4.5).
const QUEUE: u8 = 1 << 0;
const CONFIG: u8 = 1 << 1;

/// Which vector tells of what.
pub(super) struct Vectors {
    msi: Arc<dyn MsiVectors>,
    /// MSI-X is enabled.
    enabled: AtomicBool,
    isr: AtomicU8,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl Vectors {
    pub(super) fn new(msi: Arc<dyn MsiVectors>, queues: usize) -> Self {
        Self {
            msi,
            enabled: AtomicBool::new(false),
            isr: AtomicU8::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    fn register(&self, source: Source) -> Option<&AtomicU16> {
        match source {
            Source::Queue(queue) => self.queues.get(queue),
            Source::Config => Some(&self.config),
        }
    }

    /// The vector of `source`; NO_VECTOR where it has none.
    pub(super) fn get(&self, source: Source) -> u16 {
        self.register(source).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Gives `source` a vector. One that there isn't is refused, as the driver sees when it reads.
    pub(super) fn set(&self, source: Source, vector: u16) {
        let vector = if vector < self.msi.count() { vector } else { NO_VECTOR };
        if let Some(register) = self.register(source) {
            register.store(vector, Ordering::Release);
        }
    }

    pub(super) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Release);
    }

    /// What the driver reads as ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    /// Takes in a value from [`isr`](Self::isr). Returns whether it can be one.
    pub(super) fn restore_isr(&self, isr: u8) -> bool {
        self.isr.store(isr, Ordering::Release);
        isr & !(QUEUE | CONFIG) == 0
    }

    /// Whether an interrupt pin would tell of something.
    pub(super) fn is_pin_pending(&self) -> bool {
        !self.enabled.load(Ordering::Acquire) && self.isr() != 0
    }
}

impl Deliver for Vectors {
    fn deliver(&self, source: Source) {
        let enabled = self.enabled.load(Ordering::Acquire);
        match source {
            Source::Config => drop(self.isr.fetch_or(CONFIG, Ordering::AcqRel)),
            Source::Queue(_) if !enabled => drop(self.isr.fetch_or(QUEUE, Ordering::AcqRel)),
            Source::Queue(_) => {}
        }
        if let (true, Some(event)) = (enabled, self.msi.event(self.get(source))) {
            // The one failure is a full counter, which is an interrupt already pending.
            let _ = event.write(1);
        }
    }

    fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        for register in self.queues.iter().chain([&self.config]) {
            register.store(NO_VECTOR, Ordering::Release);
        }
    }
}
