//! Interrupts and addresses that are given out to a VM's devices.

use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vm_memory::GuestAddress;

use crate::arch::x86_64::layout;

/// Something that devices share has run out.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// Every pin of the IOAPIC has a device.
    #[error(
        "there is no interrupt line left for one more device: the {} of a VM are taken",
        layout::FREE_PINS.end() - layout::FREE_PINS.start() + 1
    )]
    NoPin,
    /// The hole in RAM is full, or could not be made.
    #[error("there is no address left for one more device: {0}")]
    NoAddress(#[from] vm_allocator::Error),
}

/// What is left.
pub struct Resources {
    pins: IdAllocator,
    windows: AddressAllocator,
}

impl Resources {
    /// All that a VM has.
    ///
    /// # Errors
    /// [`ResourceError::NoAddress`] where the layout is none.
    pub fn new() -> Result<Self, ResourceError> {
        let windows = layout::WINDOWS;
        Ok(Self {
            pins: IdAllocator::new(*layout::FREE_PINS.start(), *layout::FREE_PINS.end())?,
            windows: AddressAllocator::new(windows.start, windows.end - windows.start)?,
        })
    }

    /// A pin of the IOAPIC that nobody has; its number is the interrupt's.
    ///
    /// # Errors
    /// [`ResourceError::NoPin`].
    pub fn pin(&mut self) -> Result<u32, ResourceError> {
        self.pins.allocate_id().map_err(|_| ResourceError::NoPin)
    }

    /// `size` bytes for registers below 4 GiB, aligned to their size, which is a power of two.
    ///
    /// # Errors
    /// [`ResourceError::NoAddress`].
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
        let mut resources = Resources::new().expect("a layout");
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
