//! Numbers in what somebody else wrote. Past its end everything is zero.

/// Bytes with numbers in them.
#[derive(Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// As many bytes from `offset` on, or none where they are not there.
    pub fn bytes(self, offset: usize, len: usize) -> &'a [u8] {
        self.0.get(offset..).and_then(|rest| rest.get(..len)).unwrap_or_default()
    }

    fn array<const N: usize>(self, offset: usize) -> [u8; N] {
        self.0.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    /// One byte.
    pub fn byte(self, offset: usize) -> u8 {
        let [byte] = self.array(offset);
        byte
    }

    /// 16 bits, little-endian.
    pub fn half(self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    /// 32 bits, little-endian.
    pub fn word(self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    /// 64 bits, little-endian.
    pub fn long(self, offset: usize) -> u64 {
        u64::from_le_bytes(self.array(offset))
    }

    /// 16 bits, big-endian.
    pub fn big_half(self, offset: usize) -> u16 {
        u16::from_be_bytes(self.array(offset))
    }

    /// 32 bits, big-endian.
    pub fn big_word(self, offset: usize) -> u32 {
        u32::from_be_bytes(self.array(offset))
    }
}
