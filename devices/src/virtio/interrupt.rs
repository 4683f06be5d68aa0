//! How a device asks for the guest's attention (virtio 1.2, section 2.3).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a driver is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Used buffers stand in the queue of this number.
    Queue(usize),
    /// The configuration space has changed, or the device needs a reset.
    Config,
}

/// A transport's way of telling.
pub(crate) trait Deliver: Send + Sync {
    /// Tells the driver.
    fn deliver(&self, source: Source);

    /// The driver starts anew: nothing that it was told stands any more.
    fn reset(&self);
}

/// Tells the driver of one thing: that a queue has used buffers, or that the configuration space
/// has changed. Each queue has its own, which may be raised from any thread.
#[derive(Clone)]
pub struct Interrupt {
    transport: Arc<dyn Deliver>,
    source: Source,
    /// The configuration space has changed since it was last read.
    config_changed: Arc<AtomicBool>,
}

impl Interrupt {
    pub(crate) fn new(transport: Arc<dyn Deliver>, source: Source, config_changed: Arc<AtomicBool>) -> Self {
        Self { transport, source, config_changed }
    }

    /// Tells the driver. More than once before it looks is as good as once.
    pub fn raise(&self) {
        if self.source == Source::Config {
            self.config_changed.store(true, Ordering::Release);
        }
        self.transport.deliver(self.source);
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Interrupt").field(&self.source).finish()
    }
}
