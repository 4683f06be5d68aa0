//! Interrupts and addresses that are given out to a VM's devices.

use std::ops::Range;

use kvm_bindings::KVM_MAX_IRQ_ROUTES;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vm_memory::GuestAddress;

use crate::arch::x86_64::layout;
use crate::kvm::routing;

/// Something that devices share has run out.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// Every pin of the IOAPIC has a device.
    #[error(
        "there is no interrupt line left for one more device: the {} of a VM are taken",
        layout::FREE_PINS.end() - layout::FREE_PINS.start() + 1
    )]
    Pins,
    /// There is no number for one more message-signalled interrupt.
    #[error("there is no message-signalled interrupt left for one more device")]
    Messages,
    /// The addresses for devices are taken, or there are none.
    #[error("there is no address left for one more device: {0}")]
    Addresses(#[from] vm_allocator::Error),
}

/// What is left.
pub struct Resources {
    pins: IdAllocator,
    messages: IdAllocator,
    windows: AddressAllocator,
    bars: Option<AddressAllocator>,
}

impl Resources {
    /// All that a VM has, with BARs in `bars` where it has a PCI bus.
    ///
    /// # Errors
    /// [`ResourceError::Addresses`] where the layout is none.
    pub fn new(bars: Option<&Range<u64>>) -> Result<Self, ResourceError> {
        let addresses =
            |range: &Range<u64>| AddressAllocator::new(range.start, range.end.saturating_sub(range.start));
        Ok(Self {
            pins: IdAllocator::new(*layout::FREE_PINS.start(), *layout::FREE_PINS.end())?,
            messages: IdAllocator::new(routing::PINS, KVM_MAX_IRQ_ROUTES as u32 - 1)?,
            windows: addresses(&layout::WINDOWS)?,
            bars: bars.map(addresses).transpose()?,
        })
    }

    /// A pin of the IOAPIC that nobody has; its number is the interrupt's.
    ///
    /// # Errors
    /// [`ResourceError::Pins`].
    pub fn pin(&mut self) -> Result<u32, ResourceError> {
        self.pins.allocate_id().map_err(|_| ResourceError::Pins)
    }

    /// The number of a message-signalled interrupt that nobody has.
    ///
    /// # Errors
    /// [`ResourceError::Messages`].
    pub fn message(&mut self) -> Result<u32, ResourceError> {
        self.messages.allocate_id().map_err(|_| ResourceError::Messages)
    }

    /// `size` bytes for a BAR, aligned to their size, which is a power of two.
    ///
    /// # Errors
    /// [`ResourceError::Addresses`].
    pub fn bar(&mut self, size: u64) -> Result<GuestAddress, ResourceError> {
        let bars = self.bars.as_mut().ok_or(vm_allocator::Error::ResourceNotAvailable)?;
        Ok(GuestAddress(bars.allocate(size, size, AllocPolicy::FirstMatch)?.start()))
    }

    /// `size` bytes for registers below 4 GiB, aligned to their size, which is a power of two.
    ///
    /// # Errors
    /// [`ResourceError::Addresses`].
    pub fn window(&mut self, size: u64) -> Result<GuestAddress, ResourceError> {
        let range = self.windows.allocate(size, size, AllocPolicy::FirstMatch)?;
        Ok(GuestAddress(range.start()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_given_out_twice_and_an_end_is_told() {
        let mut resources = Resources::new(None).expect("a layout");
        let pins: Vec<_> = std::iter::from_fn(|| resources.pin().ok()).collect();
        assert_eq!(pins, (16..24).collect::<Vec<_>>());
        assert!(resources.pin().unwrap_err().to_string().contains("the 8 of a VM"));
        let windows: Vec<_> = std::iter::from_fn(|| resources.window(0x1000).ok()).collect();
        let size = layout::WINDOWS.end - layout::WINDOWS.start;
        assert_eq!(windows.len() as u64, size / 0x1000);
        assert!(windows.windows(2).all(|pair| pair[0].0 + 0x1000 == pair[1].0));
        assert!(
            layout::HOLE.start <= layout::WINDOWS.start && layout::WINDOWS.end <= u64::from(layout::IOAPIC)
        );
    }
}
