//! The entropy device (virtio 1.2, section 5.4).

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemoryMmap;

use super::device::{Active, Progress, VirtioDevice};
use super::queue::{Budget, Chain, Faults, Verdict, serve};
use crate::state::{self, StateError, Version};

/// Bytes that one request gets at most; the driver sees from the used length
/// that it got less than it asked for, and asks again.
pub const MOST_BYTES: usize = 64 << 10;

/// How much randomness is made at a time, on the stack.
const PIECE: usize = 4096;

const QUEUE_SIZES: [u16; 1] = [64];

const BUDGET: Budget = Budget { chains: 64, bytes: 4 * MOST_BYTES as u64 };

/// What an entropy device knows, as data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {
    version: Version<1>,
    faults: Faults,
}

/// Gives the guest the host's randomness (`getrandom(2)`).
#[derive(Default)]
pub struct Rng {
    faults: Faults,
}

impl Rng {
    /// A device that no driver has found yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Malformed chains handed back since the device was made.
    pub fn malformed(&self) -> u64 {
        self.faults.total()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _active: &mut Active) {}

    fn reset(&mut self) {
        self.faults.forgive();
    }

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        serve(active, index, &mut self.faults, BUDGET, |memory, chain| answer(memory, chain))
    }

    fn save(&self) -> Result<Value, StateError> {
        state::to_value(&RngState { version: Version, faults: self.faults })
    }

    fn restore(&mut self, state: Value, _active: Option<&mut Active>) -> Result<(), StateError> {
        let state: RngState = state::from_value::<_, 1>("the entropy device", state)?;
        self.faults = state.faults;
        Ok(())
    }
}

/// Fills a request. Buffers for reading have no place in one (section 5.4.6.1).
fn answer(memory: &GuestMemoryMmap, chain: &Chain) -> Verdict {
    if !chain.readable().is_empty() {
        return Verdict::Malformed;
    }
    let mut writer = chain.writer(memory);
    let mut piece = [0; PIECE];
    for _ in 0..MOST_BYTES / PIECE {
        let wanted = usize::try_from(writer.left()).unwrap_or(PIECE).min(PIECE);
        let Some(piece) = piece.get_mut(..wanted).filter(|piece| !piece.is_empty()) else { break };
        if random(piece).is_err() || writer.write(piece) < piece.len() {
            break;
        }
    }
    Verdict::Used(writer.written())
}

/// Waits only where the host itself has no entropy yet, early in its boot.
fn random(out: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: getrandom writes at most rest.len() bytes to rest, which is ours for the call.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
