//! The configuration space of a block device (virtio 1.2, section 5.2.4).

use super::disk::SECTOR;

/// Bytes of it that are told: to the fields of zoned devices, which this is none of.
const SIZE: usize = 60;

/// Where `writeback` lies, the one field that a driver writes.
pub const WRITEBACK: usize = 32;

/// What a driver is told of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes.
    pub size: u64,
    /// Buffers of one request.
    pub most_segments: u32,
    /// Bytes of one buffer.
    pub most_segment: u32,
    /// Bytes of a block.
    pub block: u32,
    /// Whether writes wait in a cache until they are flushed.
    pub writeback: bool,
    /// Queues.
    pub queues: u16,
    /// Sectors that one discard or write of zeros may be about.
    pub most_cleared: u32,
}

impl Config {
    /// As it lies in the space.
    pub fn bytes(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |offset: usize, value: &[u8]| {
            if let Some(place) = bytes.get_mut(offset..offset + value.len()) {
                place.copy_from_slice(value);
            }
        };
        let block_sectors = u64::from(self.block) / SECTOR;
        put(0, &(self.size / SECTOR).to_le_bytes());
        put(8, &self.most_segment.to_le_bytes());
        put(12, &self.most_segments.to_le_bytes());
        put(20, &self.block.to_le_bytes());
        // What the host writes at once is a page, which is 8 sectors: 2 to the power of this many blocks.
        put(24, &[(4096 / self.block.max(1)).checked_ilog2().unwrap_or(0) as u8]);
        put(WRITEBACK, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        // Discard: sectors, segments, alignment. Write zeroes: sectors, segments, may unmap.
        put(36, &self.most_cleared.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &u32::try_from(block_sectors).unwrap_or(1).to_le_bytes());
        put(48, &self.most_cleared.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_blk::virtio_blk_config;

    use super::*;

    #[test]
    fn each_field_lies_where_drivers_look() {
        let config = Config {
            size: 0x1122_3344_5566 * SECTOR,
            most_segments: 254,
            most_segment: 1 << 18,
            block: 512,
            writeback: true,
            queues: 4,
            most_cleared: 0x0102_0304,
        };
        let bytes = config.bytes();
        let at = |offset: usize, len: usize| {
            bytes[offset..offset + len].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        assert_eq!(at(offset_of!(virtio_blk_config, capacity), 8), 0x1122_3344_5566);
        assert_eq!(at(offset_of!(virtio_blk_config, size_max), 4), 1 << 18);
        assert_eq!(at(offset_of!(virtio_blk_config, seg_max), 4), 254);
        assert_eq!(at(offset_of!(virtio_blk_config, blk_size), 4), 512);
        assert_eq!(at(offset_of!(virtio_blk_config, physical_block_exp), 1), 3);
        assert_eq!(at(offset_of!(virtio_blk_config, wce), 1), 1);
        assert_eq!(offset_of!(virtio_blk_config, wce), WRITEBACK);
        assert_eq!(at(offset_of!(virtio_blk_config, num_queues), 2), 4);
        assert_eq!(at(offset_of!(virtio_blk_config, max_discard_sectors), 4), 0x0102_0304);
        assert_eq!(at(offset_of!(virtio_blk_config, max_discard_seg), 4), 1);
        assert_eq!(at(offset_of!(virtio_blk_config, discard_sector_alignment), 4), 1);
        assert_eq!(at(offset_of!(virtio_blk_config, max_write_zeroes_sectors), 4), 0x0102_0304);
        assert_eq!(at(offset_of!(virtio_blk_config, max_write_zeroes_seg), 4), 1);
        assert_eq!(at(offset_of!(virtio_blk_config, write_zeroes_may_unmap), 1), 1);
        let large = Config { block: 4096, ..config }.bytes();
        assert_eq!((large[24], large[44]), (0, 8));
    }
}
