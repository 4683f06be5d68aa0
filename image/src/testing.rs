//! Kernels made up for tests: small, and as a compiler, `relocs` and `mkpiggy` would lay them out.

use std::io::Write;

use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use crate::kernel::LINK_MAP;
use crate::kernel::payload::Format;

/// The physical address that they are linked for.
pub const BASE: u64 = 16 << 20;
/// Where the second segment lies, from there on.
const DATA: u64 = 2 << 20;

/// A kernel to be.
#[derive(Clone, Debug)]
pub struct TestKernel {
    /// How it is packed.
    pub format: Format,
    /// Bytes of code, in its first segment.
    pub code: Vec<u8>,
    /// Bytes of data, in its second.
    pub data: Vec<u8>,
    /// Bytes behind them that are zero.
    pub bss: u64,
    /// Places of relocations in the order of the table's runs, from the end on, as the distance from [`BASE`]; no run
    /// at all is no table.
    pub runs: Vec<Vec<u64>>,
}

impl Default for TestKernel {
    fn default() -> Self {
        let mut data = vec![0; 3 * 4096];
        data[8..16].copy_from_slice(&(LINK_MAP + BASE + 0x10).to_le_bytes());
        let mut code: Vec<u8> = (0..2 * 4096).map(|number| (number % 251) as u8).collect();
        code[4..8].copy_from_slice(&((LINK_MAP + BASE + 0x20) as u32).to_le_bytes());
        Self {
            format: Format::Lz4,
            code,
            data,
            bss: 0x10_0000,
            runs: vec![vec![4], vec![16], vec![DATA + 8]],
        }
    }
}

impl TestKernel {
    /// What it is in memory at [`BASE`], without relocation.
    pub fn in_memory(&self) -> Vec<u8> {
        let mut memory = vec![0; DATA as usize + self.data.len() + self.bss as usize];
        memory[..self.code.len()].copy_from_slice(&self.code);
        memory[DATA as usize..DATA as usize + self.data.len()].copy_from_slice(&self.data);
        memory
    }

    /// Its ELF, with its relocations behind it.
    pub fn unpacked(&self) -> Vec<u8> {
        let code_at = 4096;
        let data_at = code_at + self.code.len() as u64;
        let mut elf = vec![0; code_at as usize];
        let mut write = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
        // ELFCLASS64, ELFDATA2LSB, EV_CURRENT; ET_EXEC, EM_X86_64.
        write(0, b"\x7fELF\x02\x01\x01");
        write(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
        write(24, &BASE.to_le_bytes());
        write(32, &64u64.to_le_bytes());
        // Sizes of its header and of program headers, how many, and the same of sections.
        write(52, &[64, 0, 56, 0, 2, 0, 64, 0, 0, 0]);
        let segments = [
            (code_at, BASE, self.code.len() as u64, 0),
            (data_at, BASE + DATA, self.data.len() as u64, self.bss),
        ];
        for (at, (offset, address, size, more)) in (64..).step_by(56).zip(segments) {
            write(at, &[1, 0, 0, 0, 7, 0, 0, 0]);
            let numbers = [offset, LINK_MAP + address, address, size, size + more, 2 << 20];
            numbers
                .iter()
                .zip((at + 8..).step_by(8))
                .for_each(|(number, at)| write(at, &number.to_le_bytes()));
        }
        elf.extend(&self.code);
        elf.extend(&self.data);
        for run in self.runs.iter().rev() {
            elf.extend([0; 4]);
            for place in run.iter().rev() {
                elf.extend(((LINK_MAP + BASE + place) as u32).to_le_bytes());
            }
        }
        elf
    }

    /// The whole bzImage.
    pub fn bzimage(&self) -> Vec<u8> {
        self.bzimage_with(&pack(&self.unpacked(), self.format))
    }

    /// A bzImage with this payload.
    pub fn bzimage_with(&self, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 0x40];
        let mut write = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        write(0x1f1, &[1]);
        write(0x1f4, &(((0x40 + payload.len()) / 16) as u32).to_le_bytes());
        write(0x202, b"HdrS\x0f\x02");
        write(0x230, &(2u32 << 20).to_le_bytes());
        write(0x234, &[1, 21, 1, 0]);
        write(0x248, &0x40u32.to_le_bytes());
        write(0x24c, &(payload.len() as u32).to_le_bytes());
        write(0x258, &BASE.to_le_bytes());
        write(0x260, &(16u32 << 20).to_le_bytes());
        image.extend(payload);
        image
    }
}

/// Packs as Linux's build does: gzip has the size in it, to all others it is added.
///
/// # Panics
/// In no practice: it is written to memory.
pub fn pack(unpacked: &[u8], format: Format) -> Vec<u8> {
    let mut packed = match format {
        Format::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(unpacked).expect("memory takes it");
            return encoder.finish().expect("memory takes it");
        }
        Format::Lz4 => {
            let mut frame = vec![0x02, 0x21, 0x4c, 0x18];
            for block in unpacked.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                frame.extend((block.len() as u32).to_le_bytes());
                frame.extend(block);
            }
            frame
        }
        Format::Zstd => compress_to_vec(unpacked, CompressionLevel::Fastest),
        Format::Xz => {
            let mut options = lzma_rust2::XzOptions::with_preset(1);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).expect("options are good");
            writer.write_all(unpacked).expect("memory takes it");
            writer.finish().expect("memory takes it")
        }
        Format::Lzma => {
            let options = lzma_rust2::LzmaOptions::with_preset(1);
            let mut writer =
                lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).expect("options are good");
            writer.write_all(unpacked).expect("memory takes it");
            writer.finish().expect("memory takes it")
        }
    };
    packed.extend((unpacked.len() as u32).to_le_bytes());
    packed
}
