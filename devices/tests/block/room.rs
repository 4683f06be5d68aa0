//! An honest driver of a block device, and what it asks for.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use devices::testing::{BUFFERS, Carrier, Guest};
use devices::virtio::block::Block;
use devices::virtio::block::disk::Disk;
use devices::virtio::block::handle::Handle;
use devices::virtio::block::raw::{Cache, RawDisk, RawOptions};
use devices::virtio::block::ring;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

pub const SECTORS: u64 = 256;
pub const HEADER: u64 = BUFFERS;
pub const DATA: u64 = BUFFERS + 0x1000;
pub const STATUS: u64 = BUFFERS + 0x6_0000;

/// What a disk of 128 KiB holds: every 4 bytes their own place.
pub fn content() -> Vec<u8> {
    (0..(SECTORS * 512) as u32).step_by(4).flat_map(u32::to_le_bytes).collect()
}

pub fn file() -> TempFile {
    let file = TempFile::new().unwrap();
    fs::write(file.as_path(), content()).unwrap();
    file
}

pub const WRITABLE: RawOptions = RawOptions { read_only: false, cache: Cache::Direct, stated: false };

pub fn raw(path: &Path, options: RawOptions) -> Arc<dyn Disk> {
    Arc::new(RawDisk::open(path, options).unwrap())
}

/// Whether the kernel does what it can by itself. All tests are there twice: so in the program `block`, and with
/// threads alone in `block_on_threads`.
pub fn with_ring() -> bool {
    env!("CARGO_CRATE_NAME") == "block" && ring::look().is_ok()
}

/// A device, on the engine that this program is about.
pub fn block(disk: Arc<dyn Disk>, id: &str, queues: u16) -> Block {
    let block = Block::new(disk, id, queues).unwrap();
    if with_ring() { block } else { block.on_threads() }
}

/// What a test of this module is called on the command line.
pub fn this_test(module: &str, name: &str) -> String {
    let (_, within) = module.split_once("::").unwrap();
    format!("{within}::{name}")
}

pub struct Room {
    pub guest: Guest,
    pub handle: Handle,
}

impl Room {
    pub fn new(carrier: Carrier, disk: Arc<dyn Disk>, refused: u64) -> Self {
        Self::of(carrier, block(disk, "disk-of-a-long-name-indeed", 2), refused)
    }

    pub fn of(carrier: Carrier, block: Block, refused: u64) -> Self {
        let handle = block.handle();
        let mut guest = Guest::on(carrier, |_| Box::new(block));
        guest.start(refused);
        Self { guest, handle }
    }

    pub fn memory(&self) -> &vm_memory::GuestMemoryMmap {
        &self.guest.ram.memory
    }

    /// Sends a request with these buffers between header and status, each with the flags of its descriptor, and
    /// waits until it is over. Returns its status and how many bytes were written, or none where it was none.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: &[(u64, u32, u32)],
    ) -> (Option<u8>, u32) {
        self.ask(queue, kind, sector, data);
        let written = self.finished(queue);
        (self.status(), written)
    }

    /// Sends a request, and does not wait.
    pub fn ask(&mut self, queue: usize, kind: u32, sector: u64, data: &[(u64, u32, u32)]) {
        self.write_header(kind, sector);
        self.memory().write_obj(0xaa_u8, GuestAddress(STATUS)).unwrap();
        self.guest.describe(queue, 0, HEADER, 16, VRING_DESC_F_NEXT, 1);
        let mut place = 1;
        for &(address, len, flags) in data {
            self.guest.describe(queue, place, address, len, flags | VRING_DESC_F_NEXT, place + 1);
            place += 1;
        }
        self.guest.describe(queue, place, STATUS, 1, VRING_DESC_F_WRITE, 0);
        self.guest.send(queue, 0);
    }

    /// Writes a request's header.
    pub fn write_header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory().write_slice(&header, GuestAddress(HEADER)).unwrap();
    }

    /// How the last request ended, if it did.
    pub fn status(&self) -> Option<u8> {
        let status: u8 = self.memory().read_obj(GuestAddress(STATUS)).unwrap();
        (status != 0xaa).then_some(status)
    }

    pub fn finished(&mut self, queue: usize) -> u32 {
        loop {
            match self.guest.used(queue)[..] {
                [] => assert!(self.guest.wait(10_000), "nothing comes back"),
                [(0, written)] => return written,
                ref more => panic!("{more:?}"),
            }
        }
    }

    pub fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        assert_eq!(
            self.request(0, VIRTIO_BLK_T_IN, sector, &[(DATA, len, VRING_DESC_F_WRITE)]),
            (OK, len + 1)
        );
        let mut bytes = vec![0; len as usize];
        self.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        bytes
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> Option<u8> {
        self.memory().write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.request(1, VIRTIO_BLK_T_OUT, sector, &[(DATA, bytes.len() as u32, 0)]).0
    }

    pub fn clear(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> Option<u8> {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.memory().write_slice(&segment, GuestAddress(DATA)).unwrap();
        self.request(0, kind, 0, &[(DATA, 16, 0)]).0
    }
}

pub const OK: Option<u8> = Some(VIRTIO_BLK_S_OK as u8);
pub const IO_ERROR: Option<u8> = Some(VIRTIO_BLK_S_IOERR as u8);
pub const UNSUPPORTED: Option<u8> = Some(VIRTIO_BLK_S_UNSUPP as u8);
