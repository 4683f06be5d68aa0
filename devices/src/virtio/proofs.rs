//! What is proven of descriptor chains: by Kani where it is installed, else for every chain within
//! small bounds (`make prove`).

use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::queue::{Buffer, Chain};

/// A memory of so many bytes from 0 on.
const MEMORY: u64 = 8;
/// A queue of so many descriptors.
const SIZE: u16 = 3;

fn inside(buffer: &Buffer) -> bool {
    buffer.address.0.checked_add(u64::from(buffer.len)).is_some_and(|end| end <= MEMORY)
}

/// A chain that is taken is one that a device can work on without a further look: not longer than
/// the queue, ended by its last descriptor, no buffer empty or outside memory, and those to read
/// before those to write. And every such chain is taken.
fn taken_if_and_only_if_sound(descriptors: &[Descriptor]) {
    let mut chain = Chain::default();
    let taken = chain.check(0, descriptors.iter().copied(), inside, SIZE);
    let buffer = |d: &Descriptor| Buffer { address: GuestAddress(d.addr().0), len: d.len() };
    let writes = descriptors.iter().skip_while(|d| !d.is_write_only());
    let sound = descriptors.len() <= usize::from(SIZE)
        && descriptors.last().is_some_and(|last| !last.has_next())
        && descriptors.iter().all(|d| d.len() > 0 && inside(&buffer(d)))
        && writes.clone().all(Descriptor::is_write_only);
    assert_eq!(taken, sound, "{descriptors:?}");
    if taken {
        let reads = descriptors.len() - writes.count();
        assert_eq!((chain.readable().len(), chain.writable().len()), (reads, descriptors.len() - reads));
        let all = chain.readable().iter().chain(chain.writable());
        assert!(all.zip(descriptors).all(|(taken, given)| *taken == buffer(given)));
    }
}

#[cfg(kani)]
#[kani::proof]
#[kani::unwind(6)]
fn any_chain_is_taken_if_and_only_if_it_is_sound() {
    let descriptor = || Descriptor::new(kani::any(), kani::any(), kani::any::<u16>() & 3, kani::any());
    let descriptors = [descriptor(), descriptor(), descriptor(), descriptor()];
    let count: usize = kani::any();
    kani::assume(count <= descriptors.len());
    taken_if_and_only_if_sound(&descriptors[..count]);
}

#[cfg(test)]
mod bounded {
    use super::*;

    #[test]
    fn every_chain_within_bounds_is_taken_if_and_only_if_it_is_sound() {
        let mut kinds = Vec::new();
        for address in [0, MEMORY - 1, MEMORY, u64::MAX] {
            for len in [0, 1, MEMORY as u32, u32::MAX] {
                for flags in 0..4u16 {
                    kinds.push(Descriptor::new(address, len, flags, 0));
                }
            }
        }
        let mut checked = 0u64;
        let mut chain = Vec::new();
        extend(&kinds, &mut chain, &mut checked);
        println!(
            "checked exhaustively, not proven: {checked} chains of up to {} descriptors of {} kinds, queue of {SIZE}",
            SIZE + 1,
            kinds.len(),
        );
    }

    /// Every chain that begins with `chain`. The last place takes a few kinds only: a chain that
    /// long is too long whatever stands there.
    fn extend(kinds: &[Descriptor], chain: &mut Vec<Descriptor>, checked: &mut u64) {
        taken_if_and_only_if_sound(chain);
        *checked += 1;
        if chain.len() > usize::from(SIZE) {
            return;
        }
        let few = if chain.len() == usize::from(SIZE) { 4 } else { kinds.len() };
        for kind in &kinds[..few] {
            chain.push(*kind);
            extend(kinds, chain, checked);
            chain.pop();
        }
    }
}
