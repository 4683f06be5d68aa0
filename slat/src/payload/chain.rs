//! The chain of pointers that a chase follows.

/// Writes a chain of `links` pointers, one a 4 KiB page, that visits all in
/// random order and comes back to the first: the same order each time.
///
/// `write` takes the offset of a link and its value, which is `base` plus the offset of the next.
///
/// # Errors
/// What `write` says.
pub fn chain<E>(links: u64, base: u64, mut write: impl FnMut(u64, u64) -> Result<(), E>) -> Result<(), E> {
    let mut order: Vec<u64> = (0..links).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    // Sattolo's shuffle gives one single cycle.
    for i in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(i, (state % i as u64) as usize);
    }
    // Each in another line of its page, or all would fight for one set of the cache; the first at 0.
    let offset = |page: u64| page * 4096 + page % 64 * 64;
    let mut from = 0;
    for _ in 0..links {
        let to = order.get(from as usize).copied().unwrap_or(0);
        write(offset(from), base + offset(to))?;
        from = to;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn a_chain_visits_every_page_once(links in 1u64..2000) {
            let mut memory = BTreeMap::new();
            chain(links, 1 << 40, |offset, link| { memory.insert(offset, link); Ok::<(), ()>(()) }).expect("no error");
            let mut at = 0;
            for _ in 0..links {
                at = memory.remove(&at).expect("a link") - (1 << 40);
            }
            prop_assert_eq!(at, 0);
            prop_assert!(memory.is_empty());
        }
    }
}
