//! Free page reporting (virtio 1.2, section 5.5.6.7): the guest names free
//! memory, the host drops it, and the guest uses it again without a word.

use devices::virtio::queue::Chain;

use crate::discard::Discard;
use crate::ranges::Range;
use api::units::Bytes;

/// Drops what a chain reports and returns how much of it is guest RAM; `None`
/// where it is not a report, which has buffers to write only.
pub(crate) fn drop_reported(chain: &Chain, discard: &mut Discard) -> Option<Bytes> {
    if !chain.readable().is_empty() {
        return None;
    }
    // At most as many as the queue has descriptors.
    let mut free: Vec<Range> = chain
        .writable()
        .iter()
        .map(|buffer| Range { start: buffer.address, len: Bytes(u64::from(buffer.len)) })
        .collect();
    Some(discard.drop_free(&mut free))
}
