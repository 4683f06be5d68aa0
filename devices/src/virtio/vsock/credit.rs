//! How much may be on its way on a connection (virtio 1.2, section 5.10.6.3). All counts are modulo 2^32.

/// Bytes that this side keeps for what a program on the host has not taken.
pub const BUFFER: u32 = 64 << 10;

/// Counts of one connection. What the guest says of its side may be a lie: then it gets less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// What the guest keeps.
    guest_buffer: u32,
    /// What its program has taken.
    guest_forwarded: u32,
    /// What was sent to it.
    sent: u32,
    /// What came of it.
    received: u32,
    /// What of that was passed on.
    forwarded: u32,
    /// What of that the guest was told.
    told: u32,
}

impl Credit {
    /// The guest says what it has room for.
    pub fn heard(&mut self, buffer: u32, forwarded: u32) {
        (self.guest_buffer, self.guest_forwarded) = (buffer, forwarded);
    }

    /// Bytes that the guest has room for.
    pub fn free(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// So many bytes were sent.
    pub fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// So many bytes came. Returns whether the guest may have sent them.
    #[must_use]
    pub fn received(&mut self, bytes: u32) -> bool {
        let kept = self.received.wrapping_sub(self.forwarded);
        self.received = self.received.wrapping_add(bytes);
        bytes <= BUFFER.saturating_sub(kept)
    }

    /// So many bytes were passed on.
    pub fn forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Whether the guest believes that there is so little room that it has to be told of more.
    pub fn is_low(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= BUFFER / 2
    }

    /// What has been passed on, as the guest is told now.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Counts that wrap around are as good as others, and nobody sends more than the other has room for.
        #[test]
        fn counts_wrap_around(
            start in prop_oneof![Just(0), Just(u32::MAX - 10_000), any::<u32>()],
            steps in prop::collection::vec((any::<bool>(), 0..200_000_u32), 1..200),
        ) {
            let mut credit = Credit {
                guest_forwarded: start,
                sent: start,
                received: start,
                forwarded: start,
                told: start,
                guest_buffer: 100_000,
            };
            let (mut at_guest, mut here) = (0_u32, 0_u32);
            for (out, bytes) in steps {
                if out {
                    prop_assert_eq!(credit.free(), 100_000 - at_guest);
                    let count = bytes.min(credit.free());
                    credit.sent(count);
                    at_guest += count;
                    let taken = at_guest / 2;
                    at_guest -= taken;
                    credit.heard(100_000, credit.guest_forwarded.wrapping_add(taken));
                } else {
                    let fits = bytes <= BUFFER - here;
                    prop_assert_eq!(credit.received(bytes), fits);
                    if !fits {
                        return Ok(());
                    }
                    here += bytes;
                    let taken = here / 3;
                    here -= taken;
                    credit.forwarded(taken);
                    if credit.is_low() {
                        prop_assert_eq!(credit.received.wrapping_sub(credit.tell()), here);
                    }
                }
            }
        }

        #[test]
        fn a_guest_that_lies_gets_no_more_than_it_says(buffer in any::<u32>(), forwarded in any::<u32>(), sent in any::<u32>()) {
            let mut credit = Credit { sent, ..Credit::default() };
            credit.heard(buffer, forwarded);
            prop_assert!(credit.free() <= buffer);
        }
    }
}
