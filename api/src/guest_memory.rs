//! What a guest's own kernel makes of the memory that it was given.
//!
//! What a guest was *given* is its memory map less its balloon. Its kernel *manages* less than that
//! (`MemTotal`). Its own code and the structures of its pages are the kernel's *share*, which counts as
//! used. Whatever else it does not manage (`mem=`, `crashkernel=`, memory that was plugged and is not on
//! line, all but a little of it in a capture kernel) is *unmanaged*: nothing in the guest uses that, and
//! the balloon can't have it. What it was given less that is what the guest *has*.

use std::time::Duration;

use crate::units::{Bytes, Pages};

/// What a Linux kernel has for itself beside what grows with its memory: code, data, what firmware keeps,
/// and the areas of its processors. Stock kernels take 35 to 60 MiB.
const KERNEL_ITSELF: Bytes = Bytes::mib(40);

/// How much more than its [usual share](usual_share) a kernel may take until nobody believes that it does.
const KERNEL_MORE: Bytes = Bytes::mib(32);

/// Linux describes each page of 4096 bytes by a structure of 64 (`struct page`).
const PAGE_STRUCTURES: u64 = 64;

/// Bounce buffers for devices that reach 32 bits (`swiotlb`), in a guest with memory beyond these.
const BOUNCE_BUFFERS: Bytes = Bytes::mib(64);

/// What lies beyond this much memory has addresses of more than 32 bits: the last GiB below is for devices.
const WITHIN_32_BITS: Bytes = Bytes::gib(3);

/// What a guest's kernel is left beside what it spends before it runs, so that a stock one starts its programs.
pub const LEAST_TO_RUN: Bytes = Bytes::mib(192);

/// What a Linux kernel spends on a memory map of `map` before it runs, whatever of the map it is left:
/// the structures of all pages, and bounce buffers.
pub fn fixed_cost(map: Bytes) -> Bytes {
    let bounce = if map > WITHIN_32_BITS { BOUNCE_BUFFERS } else { Bytes::ZERO };
    Bytes(map.0 / PAGE_STRUCTURES).saturating_add(bounce)
}

/// The least that a guest with a memory map of `map` should start with, in whole steps of 64 MiB.
pub fn least_start(map: Bytes) -> Bytes {
    const STEP: u64 = 64 << 20;
    let least = fixed_cost(map).saturating_add(LEAST_TO_RUN);
    Bytes(least.0.div_ceil(STEP).saturating_mul(STEP))
}

/// What a Linux kernel usually has for itself of a memory map of `map`.
pub fn usual_share(map: Bytes) -> Bytes {
    // Hash tables grow with memory, too.
    KERNEL_ITSELF.saturating_add(fixed_cost(map)).saturating_add(Bytes(map.0 / 512))
}

/// The most that a kernel is believed to have for itself of a memory map of `map`.
pub fn largest_share(map: Bytes) -> Bytes {
    usual_share(map).saturating_add(KERNEL_MORE).saturating_add(Bytes(map.0 / 128))
}

/// What a guest had at the moment of one report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Had {
    /// What its kernel managed then, without the balloon.
    pub managed: Bytes,
    /// What its kernel had for itself: all that it did not manage, or, where that is more than
    /// [any kernel takes](largest_share), the [usual share](usual_share).
    pub kernel: Bytes,
    /// What it was given beside these.
    pub unmanaged: Bytes,
}

impl Had {
    /// What a guest had that was `given` so much of a memory map of `map`, and whose kernel `managed`
    /// that much without the balloon. More than it was given is a lie or of another moment: it counts as
    /// all of that.
    pub fn of(map: Bytes, given: Bytes, managed: Bytes) -> Self {
        let managed = managed.min(given);
        let outside = given.saturating_sub(managed);
        let kernel = if outside <= largest_share(map) { outside } else { usual_share(map).min(outside) };
        Self { managed, kernel, unmanaged: outside.saturating_sub(kernel) }
    }

    /// What it had: what was managed, and what the kernel had for itself.
    pub fn all(&self) -> Bytes {
        self.managed.saturating_add(self.kernel)
    }
}

/// What a guest's kernel said of its memory, all of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemory {
    /// How long ago it said so.
    pub age: Duration,
    /// What the guest had then (see [`Had::all`]); `None` where its VMM does not tell.
    pub had: Option<Bytes>,
    /// What its kernel managed then; `None` where it is not known.
    pub managed: Option<Bytes>,
    /// What it could have given up without pain.
    pub spare: Bytes,
}

impl GuestMemory {
    /// What it used: what it had less what it could spare, and never more than its kernel managed. For a VMM
    /// that does not tell what it had then, that is what it has now, `actual`.
    pub fn used(&self, actual: Bytes) -> Bytes {
        let used = self.had.unwrap_or(actual).saturating_sub(self.spare);
        self.managed.map_or(used, |managed| used.min(managed))
    }

    /// What the guest's kernel had for itself, which no target can take; `None` where it is not known.
    pub fn kernel(&self) -> Option<Bytes> {
        Some(self.had?.saturating_sub(self.managed?))
    }
}

/// Whole pages of `map` that a balloon holds for a guest to have `target`, of which `unmanaged` can't go
/// into it.
pub fn balloon_for(map: Bytes, target: Bytes, unmanaged: Bytes) -> Pages {
    map.saturating_sub(target).saturating_sub(unmanaged).pages()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_guest_has_all_that_it_was_given() {
        // Linux 6.1 of Debian, as its first line about memory tells.
        for (map, managed) in [(256, 219), (512, 471), (1024, 967), (4096, 3900)] {
            let map = Bytes::mib(map);
            let had = Had::of(map, map, Bytes::mib(managed));
            assert_eq!((had.unmanaged, had.all()), (Bytes::ZERO, map));
        }
    }

    #[test]
    fn what_no_kernel_takes_is_unmanaged() {
        // mem=256M of 512.
        let had = Had::of(Bytes::mib(512), Bytes::mib(512), Bytes::mib(219));
        assert!(had.all() >= Bytes::mib(256) && had.all() < Bytes::mib(280), "{had:?}");
        let said = GuestMemory {
            had: Some(had.all()),
            managed: Some(had.managed),
            spare: Bytes::mib(170),
            ..GuestMemory::default()
        };
        assert!(said.used(Bytes::mib(512)) < Bytes::mib(110), "{}", said.used(Bytes::mib(512)));
        let full = GuestMemory { spare: Bytes::ZERO, ..said };
        assert_eq!(full.used(Bytes::mib(512)), Bytes::mib(219), "no more than it manages");
    }

    #[test]
    fn a_lie_is_bounded() {
        let given = Bytes::mib(300);
        for managed in [0, 1, u64::MAX] {
            let had = Had::of(Bytes::mib(512), given, Bytes(managed));
            assert_eq!(had.all().saturating_add(had.unmanaged), given);
        }
        assert_eq!(Had::of(Bytes(u64::MAX), Bytes(u64::MAX), Bytes(u64::MAX)).unmanaged, Bytes::ZERO);
    }

    #[test]
    fn a_large_map_costs_before_the_guest_runs() {
        assert_eq!(fixed_cost(Bytes::gib(1)), Bytes::mib(16));
        assert_eq!(fixed_cost(Bytes::gib(4)), Bytes::mib(128));
        assert_eq!(fixed_cost(Bytes::gib(16)), Bytes::mib(320));
        assert_eq!(least_start(Bytes::gib(16)), Bytes::mib(512));
        assert_eq!(least_start(Bytes::gib(1)), Bytes::mib(256));
    }
}
