//! Memory in blocks that the guest plugs and unplugs (virtio-mem; virtio 1.2, section 5.15).
//!
//! The region that the blocks lie in is no memory to the guest until its
//! driver plugs some, which it may up to what the host requests. What is not
//! plugged can't be reached: the device has the host [`Access`] revoked for
//! each block that goes, and drops what was in it. So, other than with a
//! balloon, a guest's word is not needed for what it has.

mod blocks;
mod handle;
mod request;
pub mod saved;

use std::io;
use std::ops::Range as Numbers;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use devices::sandbox::{Call, SandboxNeeds};
use devices::state::StateError;
use devices::virtio::device::{Active, Progress, VirtioDevice, read_part};
use devices::virtio::queue::{Budget, Faults, Verdict, serve};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::GuestAddress;

use blocks::{BlockState, Blocks};
pub use handle::Handle;
use handle::Shared;
use request::{Asked, Request, Response};

use crate::advise;
use crate::discard::Discard;
use crate::ranges::Range;
use api::status::DriverState;
use api::units::Bytes;

/// `node_id` names a proximity domain of the ACPI tables (section 5.15.3).
pub const ACPI_PXM: u32 = 0;
/// What is not plugged must not even be read (section 5.15.3).
pub const UNPLUGGED_INACCESSIBLE: u32 = 1;

/// The smallest block: a huge page of the host, so that none is ever broken by an unplug.
pub const SMALLEST_BLOCK: Bytes = Bytes::mib(2);

/// Blocks in a region at most: each may cost the host a mapping of its own, of
/// which a process has 65,530 (`vm.max_map_count`).
const MOST_BLOCKS: u64 = 1 << 14;

const QUEUE_SIZES: [u16; 1] = [64];

/// Requests in one event at most.
const MOST_REQUESTS: usize = 16;

/// No further request in an event once so much memory was plugged and unplugged in it.
const MOST_MOVED: Bytes = Bytes::gib(1);

/// A request is small, whatever it sets off.
const ONE_REQUEST: Budget = Budget { chains: 1, bytes: 1 };

/// `struct virtio_mem_config` (section 5.15.4).
const CONFIG_SIZE: usize = 56;

/// The size of the blocks of a region of `size` bytes.
pub fn block_size(size: Bytes) -> Bytes {
    let least = size.0.div_ceil(MOST_BLOCKS).checked_next_power_of_two().unwrap_or(1 << 63);
    SMALLEST_BLOCK.max(Bytes(least))
}

/// Whether the guest, and the devices on its behalf, can reach a range of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// They can.
    Granted,
    /// They can't.
    Revoked,
}

/// Grants or revokes access to whole blocks; the device calls it, so that it need not know how that is done.
pub type SetAccess = Box<dyn FnMut(Range, Access) -> io::Result<()> + Send>;

/// What a device is made with.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Where the region starts; a multiple of the block size.
    pub address: GuestAddress,
    /// How long it is; a multiple of the block size.
    pub size: Bytes,
    /// The most of it that may ever be plugged.
    pub most: Bytes,
    /// What memory is plugged and unplugged in: a power of two, see [`block_size`].
    pub block: Bytes,
}

/// The device. Nothing of its region is plugged, or to be reached, when it is made.
pub struct Plug {
    shared: Arc<Shared>,
    region: Range,
    blocks: Blocks,
    discard: Discard,
    set_access: SetAccess,
    faults: Faults,
    /// `requested_size` as the guest was last told.
    requested: Bytes,
    /// Plugged and unplugged in this event.
    moved: Bytes,
}

impl Plug {
    /// A device over a region whose memory `discard` drops and `set_access` opens and closes.
    ///
    /// # Errors
    /// No eventfd can be had, or region and block size don't fit together.
    pub fn new(config: Config, discard: Discard, set_access: SetAccess) -> io::Result<(Self, Handle)> {
        let Config { address, size, most, block } = config;
        let whole = |value: u64| value.is_multiple_of(block.0);
        let end = address.0.checked_add(size.0);
        if !block.0.is_power_of_two() || !whole(address.0) || !whole(size.0) || end.is_none() || most > size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{size} at {:#x} is no region of blocks of {block}", address.0),
            ));
        }
        let shared = Arc::new(Shared::new(most, block)?);
        let handle = Handle(shared.clone());
        let device = Self {
            shared,
            region: Range { start: address, len: size },
            blocks: Blocks::new(size.0 / block.0),
            discard,
            set_access,
            faults: Faults::default(),
            requested: Bytes::ZERO,
            moved: Bytes::ZERO,
        };
        Ok((device, handle))
    }

    fn plugged(&self) -> Bytes {
        Bytes(self.blocks.plugged().saturating_mul(self.shared.block.0))
    }

    fn answer(&mut self, request: Request) -> Response {
        match request {
            Request::Plug(asked) => self.numbers(asked).map_or(Response::Error, |blocks| self.plug(blocks)),
            Request::Unplug(asked) => {
                self.numbers(asked).map_or(Response::Error, |blocks| self.unplug(blocks))
            }
            Request::UnplugAll => self.unplug_all(),
            Request::State(asked) => self
                .numbers(asked)
                .map_or(Response::Error, |blocks| Response::State(self.blocks.state(blocks))),
            Request::Unknown => Response::Error,
        }
    }

    /// The numbers of the blocks that are asked for, where all of them exist.
    fn numbers(&self, asked: Asked) -> Option<Numbers<u64>> {
        let block = self.shared.block.0;
        let offset = asked.address.0.checked_sub(self.region.start.0)?;
        let first = offset.checked_div(block).filter(|_| offset.is_multiple_of(block))?;
        let end = first.checked_add(u64::from(asked.blocks))?;
        (asked.blocks > 0 && end <= self.blocks.count()).then_some(first..end)
    }

    fn range_of(&self, blocks: &Numbers<u64>) -> Range {
        let block = self.shared.block.0;
        let start = self.region.start.0.saturating_add(blocks.start.saturating_mul(block));
        let count = blocks.end.saturating_sub(blocks.start);
        Range { start: GuestAddress(start), len: Bytes(count.saturating_mul(block)) }
    }

    fn plug(&mut self, blocks: Numbers<u64>) -> Response {
        if self.blocks.state(blocks.clone()) != BlockState::Unplugged {
            return Response::Error;
        }
        let range = self.range_of(&blocks);
        // What the host wants now, which may be less than the guest has read.
        let allowed = self.shared.state().requested;
        if self.plugged().saturating_add(range.len) > allowed {
            return Response::Nack;
        }
        if let Err(error) = (self.set_access)(range, Access::Granted) {
            self.complain("let the guest have", range, &error);
            return Response::Busy;
        }
        self.blocks.set(blocks, true);
        self.moved = self.moved.saturating_add(range.len);
        let mut state = self.shared.state();
        state.counters.plugged = state.counters.plugged.saturating_add(range.len);
        Response::Ack
    }

    fn unplug(&mut self, blocks: Numbers<u64>) -> Response {
        if self.blocks.state(blocks.clone()) != BlockState::Plugged {
            return Response::Error;
        }
        self.take_away(blocks)
    }

    /// Costs no more than what is plugged: a guest may ask for it again and again.
    fn unplug_all(&mut self) -> Response {
        loop {
            let Some(run) = self.blocks.runs().next() else { return Response::Ack };
            let Response::Ack = self.take_away(run) else { return Response::Busy };
        }
    }

    /// Takes away blocks that are plugged. Closes them to the guest first: what it writes while they are
    /// dropped would stay.
    fn take_away(&mut self, blocks: Numbers<u64>) -> Response {
        let range = self.range_of(&blocks);
        if let Err(error) = (self.set_access)(range, Access::Revoked) {
            self.complain("take back", range, &error);
            return Response::Busy;
        }
        self.discard.drop_free(&mut [range]);
        self.blocks.set(blocks, false);
        self.moved = self.moved.saturating_add(range.len);
        let mut state = self.shared.state();
        state.counters.unplugged = state.counters.unplugged.saturating_add(range.len);
        Response::Ack
    }

    /// The first tells the administrator; a guest must not be able to fill a log.
    fn complain(&self, what: &str, range: Range, error: &io::Error) {
        let mut state = self.shared.state();
        state.counters.refused = state.counters.refused.saturating_add(1);
        if state.counters.refused == 1 {
            tracing::warn!("the host could not {what} {} of memory: {error}", range.len);
        }
    }

    /// A driver is there.
    fn greet(&self, active: &Active) {
        let inaccessible = active.features & 1 << UNPLUGGED_INACCESSIBLE != 0;
        // A driver that may read what is not plugged would end the VM with it: it gets nothing.
        self.shared.state().driver = if inaccessible { DriverState::Active } else { DriverState::Broken };
        self.shared.tell_moved();
    }

    /// Brings what others may see up to date after work on the queue.
    fn publish(&mut self, broken: bool) {
        let plugged = self.plugged();
        let done = self.discard.done();
        let moved = {
            let mut state = self.shared.state();
            state.counters.malformed = self.faults.total();
            state.counters.discarded = done.bytes;
            state.counters.discard_failures = done.failures;
            if broken {
                state.driver = DriverState::Broken;
            }
            std::mem::replace(&mut state.plugged, plugged) != plugged || broken
        };
        if moved {
            self.shared.tell_moved();
        }
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let fields = [
            self.shared.block.0,
            // Proximity domain 0, and padding.
            0,
            self.region.start.0,
            self.region.len.0,
            // All of it: how much may be plugged is what `requested_size` says.
            self.region.len.0,
            self.plugged().0,
            self.requested.0,
        ];
        let mut config = [0; CONFIG_SIZE];
        for (place, field) in config.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        config
    }
}

/// The device's one queue (section 5.15.2).
const REQUESTS: usize = 0;

impl VirtioDevice for Plug {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        1 << ACPI_PXM | 1 << UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn sandbox_needs(&self) -> SandboxNeeds {
        // Reserved huge pages are taken from the host as blocks are plugged.
        SandboxNeeds::calls(&[advise::CALL, Call::any(libc::SYS_fallocate)])
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        read_part(&config, offset, data);
    }

    /// All of it is the device's.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, active: &mut Active) {
        self.greet(active);
    }

    /// Plugged memory stays: only a reset of the whole system unplugs it (section 5.15.5.2).
    fn reset(&mut self) {
        self.faults.forgive();
        let mut state = self.shared.state();
        state.driver = DriverState::Absent;
        self.requested = state.requested;
        drop(state);
        self.shared.tell_moved();
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        if index != REQUESTS {
            return Progress::Done;
        }
        let willing = active.features & 1 << UNPLUGGED_INACCESSIBLE != 0;
        let mut faults = self.faults;
        let mut progress = Progress::More;
        self.moved = Bytes::ZERO;
        for _ in 0..MOST_REQUESTS {
            progress = serve(active, index, &mut faults, ONE_REQUEST, |memory, chain| {
                let Some(request) = Request::read(memory, chain) else { return Verdict::Malformed };
                let response = if willing { self.answer(request) } else { Response::Nack };
                Verdict::Used(response.write(memory, chain))
            });
            if progress != Progress::More || self.moved >= MOST_MOVED {
                break;
            }
        }
        self.faults = faults;
        self.publish(progress == Progress::Broken);
        progress
    }

    fn own_events(&self) -> Vec<RawFd> {
        vec![self.shared.wake.as_raw_fd()]
    }

    fn own_event(&mut self, _index: usize, active: Option<&mut Active>) {
        let _ = self.shared.wake.read();
        let requested = self.shared.state().requested;
        let changed = std::mem::replace(&mut self.requested, requested) != requested;
        if let (Some(active), true) = (active, changed) {
            active.config_interrupt.raise();
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        self.saved()
    }

    fn restore(&mut self, state: Value, active: Option<&mut Active>) -> Result<(), StateError> {
        self.take_in(state, active)
    }
}
