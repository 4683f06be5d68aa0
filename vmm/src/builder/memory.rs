//! The devices that move the guest's memory.

use std::io;

use api::limits::Limits;
use api::units::Bytes;
use balloon::device::{Balloon, Handle};
use balloon::discard::{self, Discard};
use balloon::plug::{self, Plug};

use crate::config::{Backing, BalloonOptions};
use crate::memory::pluggable::Pluggable;
use crate::memory::{self, Ram};

/// A region as [`Discard`] drops its memory, with `host` to do it by.
fn dropped(ram: &Ram, region: &memory::Region, host: *mut u8) -> discard::Region {
    let backing = match ram.backing() {
        Backing::Anonymous => discard::Backing::Anonymous,
        Backing::Memfd => discard::Backing::SharedFile,
        Backing::HugePages2M => discard::Backing::Hugetlb { shared: true, page: Bytes::mib(2) },
    };
    let collapses = ram.collapses().then_some(region.host);
    discard::Region { guest: region.guest, host, len: region.size, backing, collapses }
}

/// The balloon, which starts as `limits` say.
///
/// # Errors
/// The process has no descriptors left.
pub fn balloon(options: BalloonOptions, limits: Limits, ram: &Ram) -> io::Result<(Balloon, Handle)> {
    let pluggable = ram.pluggable();
    let regions = ram
        .regions()
        .iter()
        .map(|region| match pluggable.filter(|pluggable| pluggable.region().guest == region.guest) {
            // Pages of plugged memory go into the balloon as well.
            Some(pluggable) => dropped(ram, region, pluggable.dropping()),
            None => dropped(ram, region, region.host),
        })
        .collect();
    // SAFETY: the regions are guest RAM, which stays mapped for the life of the process; what is
    // in it belongs to the guest, and nothing here relies on it after set-up.
    let discard = unsafe { Discard::new(regions) };
    // Where memory is plugged, nothing is held back at the start.
    let target = if pluggable.is_some() { ram.most() } else { limits.startup() };
    let config = balloon::device::Config {
        map: ram.most(),
        target,
        deflate_on_oom: options.deflate_on_oom,
        reporting: options.reporting,
        statistics_interval: options.statistics_interval,
        // A balloon alone asks again when it is given a target.
        refills: pluggable.is_some(),
    };
    Balloon::new(config, discard)
}

/// What plugs memory into the guest.
///
/// # Errors
/// The process has no descriptors left.
pub fn plug(ram: &Ram, pluggable: &Pluggable) -> io::Result<(Plug, plug::Handle)> {
    let region = pluggable.region();
    // Blocks go whole, and what is in one may be the balloon's to advise on.
    let region_dropped = discard::Region { collapses: None, ..dropped(ram, &region, pluggable.dropping()) };
    // SAFETY: as for the balloon.
    let discard = unsafe { Discard::new(vec![region_dropped]) };
    let config = plug::Config {
        address: region.guest,
        size: region.size,
        most: pluggable.most(),
        block: plug::block_size(region.size),
    };
    Plug::new(config, discard, pluggable.set_access()?)
}
