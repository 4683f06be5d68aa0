//! Page numbers of an inflate or deflate chain, on their way to the host.

use devices::virtio::queue::{Chain, Verdict};
use vm_memory::GuestMemoryMmap;

use super::MOST_PAGES;
use super::handle::Shared;
use crate::discard::Discard;

/// Page numbers read and discarded at a time: 4 KiB of them, on the stack.
const BATCH: usize = 1024;

/// What becomes of the pages whose numbers a driver sends.
#[derive(Clone, Copy)]
pub(super) enum Flow {
    /// They go to the host now.
    Give,
    /// They go to the host when that suits it.
    GiveSoon,
    /// The guest uses them again.
    TakeBack,
}

/// Reads the page numbers of an inflate or deflate chain, a batch at a time, and moves the pages.
pub(super) fn move_pages(
    memory: &GuestMemoryMmap,
    chain: &Chain,
    discard: &mut Discard,
    shared: &Shared,
    flow: Flow,
) -> Verdict {
    let bytes = chain.len();
    if !chain.writable().is_empty() || !bytes.is_multiple_of(4) || bytes / 4 > MOST_PAGES {
        return Verdict::Malformed;
    }
    let mut reader = chain.reader(memory);
    let mut piece = [0; BATCH * 4];
    let mut pfns = [0; BATCH];
    loop {
        let count = reader.read(&mut piece);
        let (numbers, _) = piece.get(..count).unwrap_or_default().as_chunks();
        for (pfn, number) in pfns.iter_mut().zip(numbers) {
            *pfn = u32::from_le_bytes(*number);
        }
        let Some(batch) = pfns.get_mut(..numbers.len()).filter(|batch| !batch.is_empty()) else {
            return Verdict::Used(0);
        };
        match flow {
            Flow::Give | Flow::GiveSoon => {
                let given = match flow {
                    Flow::GiveSoon => discard.give_up_soon(batch),
                    _ => discard.give_up(batch),
                };
                let mut state = shared.state();
                state.counters.inflated = state.counters.inflated.saturating_add(given);
            }
            Flow::TakeBack => {
                let taken = discard.take_back(batch);
                let mut state = shared.state();
                state.counters.deflated = state.counters.deflated.saturating_add(taken);
            }
        }
    }
}
