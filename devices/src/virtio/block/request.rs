//! What a driver asks of a block device (virtio 1.2, section 5.2.6).

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::disk::{ByteRange, SECTOR};
use crate::virtio::queue::{Chain, IoVectors, Reader};

/// Sectors that one discard or write of zeros may be about: 32 MiB, as the zeros may have to be written.
pub const MOST_CLEARED_SECTORS: u32 = 32 << 11;

/// Buffers of one request, beside its header and its status.
pub const MOST_SEGMENTS: u32 = 254;

/// Bytes of one buffer.
pub const MOST_SEGMENT: u32 = 256 << 10;

/// Bytes of one read or write: all buffers that a driver may use, at their longest.
pub const MOST_BYTES: u64 = MOST_SEGMENTS as u64 * MOST_SEGMENT as u64;

/// How a request ended, as its driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// It was not, or not wholly.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not know such requests.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What is to be done with the disk.
pub enum Work {
    /// Read into guest memory from a byte of the disk on.
    Read(IoVectors, u64),
    /// Write guest memory to the disk from a byte on.
    Write(IoVectors, u64),
    /// Make last what was written.
    Flush,
    /// The bytes are not needed any more.
    Discard(ByteRange),
    /// The bytes are to be zeros; whether their room may go.
    WriteZeroes(ByteRange, bool),
}

/// What came of looking at a request.
pub enum Parsed {
    /// It has to be worked on.
    Work(Work),
    /// It has been answered, with so many bytes written before the status.
    Answered(Status, u32),
    /// It is no request: no room for a header or a status.
    Malformed,
}

/// The disk as far as requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes.
    pub size: u64,
    /// Nothing may be written.
    pub read_only: bool,
}

/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of one range to clear: sector, sectors, flags.
const SEGMENT: usize = 16;

/// Looks at a request. `id` is what the device is called.
pub fn parse(
    memory: &Arc<GuestMemoryMmap>,
    chain: &Chain,
    bounds: Bounds,
    id: &[u8; VIRTIO_BLK_ID_BYTES as usize],
) -> Parsed {
    let mut reader = chain.reader(memory);
    let mut header = [0; HEADER];
    if reader.read(&mut header) < HEADER {
        return Parsed::Malformed;
    }
    let mut writer = chain.writer(memory);
    let Some(room) = writer.left().checked_sub(1) else { return Parsed::Malformed };
    let [kind, _, sector_low, sector_high] = words(&header);
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
    let failed = Parsed::Answered(Status::IoError, 0);
    match kind {
        VIRTIO_BLK_T_IN => {
            let Some(range) = bounds.range(sector, room) else { return failed };
            let mut vectors = IoVectors::new(Arc::clone(memory));
            let wanted = usize::try_from(room).unwrap_or(0);
            if writer.vectors(wanted, &mut vectors) < wanted {
                return failed;
            }
            Parsed::Work(Work::Read(vectors, range.start))
        }
        VIRTIO_BLK_T_OUT => {
            let Some(range) = bounds.writable(sector, reader.left()) else { return failed };
            let mut vectors = IoVectors::new(Arc::clone(memory));
            let wanted = usize::try_from(reader.left()).unwrap_or(0);
            if reader.vectors(wanted, &mut vectors) < wanted {
                return failed;
            }
            Parsed::Work(Work::Write(vectors, range.start))
        }
        VIRTIO_BLK_T_FLUSH => Parsed::Work(Work::Flush),
        VIRTIO_BLK_T_GET_ID => {
            let len = id.len().min(usize::try_from(room).unwrap_or(0));
            let written = writer.write(id.get(..len).unwrap_or_default());
            Parsed::Answered(Status::Ok, u32::try_from(written).unwrap_or(0))
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            match cleared(&mut reader, bounds, kind == VIRTIO_BLK_T_DISCARD) {
                Ok(work) => Parsed::Work(work),
                Err(status) => Parsed::Answered(status, 0),
            }
        }
        _ => Parsed::Answered(Status::Unsupported, 0),
    }
}

/// The one range of a discard or a write of zeros.
fn cleared(reader: &mut Reader<'_>, bounds: Bounds, discards: bool) -> Result<Work, Status> {
    let mut segment = [0; SEGMENT];
    // One is what the configuration space allows.
    if reader.left() != SEGMENT as u64 || reader.read(&mut segment) < SEGMENT {
        return Err(Status::Unsupported);
    }
    let [low, high, sectors, flags] = words(&segment);
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discards && unmap) {
        return Err(Status::Unsupported);
    }
    if sectors > MOST_CLEARED_SECTORS {
        return Err(Status::IoError);
    }
    let sector = u64::from(high) << 32 | u64::from(low);
    let range = bounds.writable(sector, u64::from(sectors) * SECTOR).ok_or(Status::IoError)?;
    Ok(if discards { Work::Discard(range) } else { Work::WriteZeroes(range, unmap) })
}

impl Bounds {
    /// The bytes of `len` from a sector on: whole sectors within the disk, not too many, at least one.
    fn range(&self, sector: u64, len: u64) -> Option<ByteRange> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(len)?;
        let is_good = len > 0 && len.is_multiple_of(SECTOR) && len <= MOST_BYTES && end <= self.size;
        is_good.then_some(start..end)
    }

    fn writable(&self, sector: u64, len: u64) -> Option<ByteRange> {
        self.range(sector, len).filter(|_| !self.read_only)
    }
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    let mut values = [0; 4];
    for (value, word) in values.iter_mut().zip(words) {
        *value = u32::from_le_bytes(*word);
    }
    values
}

/// Writes how a request ended where its driver looks: into the last byte. Returns whether it could be.
pub fn write_status(memory: &GuestMemoryMmap, chain: &Chain, status: Status) -> bool {
    let Some(last) = chain.writable().last() else { return false };
    let place = last.address.0.saturating_add(u64::from(last.len).saturating_sub(1));
    memory.write_obj(status as u8, GuestAddress(place)).is_ok()
}
