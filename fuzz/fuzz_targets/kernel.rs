//! Any file as a bzImage, as what is packed in one, and as what the process that unpacks gives.
#![no_main]

use std::fs::File;
use std::io::Write;

use image::kernel::payload::Format;
use image::kernel::prepared::{self, PreparedKernel};
use image::testing::{TestKernel, pack};
use libfuzzer_sys::fuzz_target;
use vm_memory::VolatileSlice;

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let kernel = TestKernel::default();
    let image = match how % 4 {
        0 => rest.to_vec(),
        1 => kernel.bzimage_with(rest),
        2 => kernel.bzimage_with(&pack(rest, Format::Lz4)),
        _ => return load(rest, &prepared::key(&mut std::io::Cursor::new(b"")).expect("memory can be read")),
    };
    let mut made = Vec::new();
    if prepared::prepare(&image, &mut made).is_ok() {
        let key = prepared::key(&mut std::io::Cursor::new(image)).expect("memory can be read");
        load(&made, &key);
    }
});

/// Loads what can be loaded, where it takes no more than a fuzzer has.
fn load(made: &[u8], key: &prepared::Key) {
    let mut file: File = tempfile::tempfile().expect("a temporary file");
    file.write_all(made).expect("written");
    let Ok(kernel) = PreparedKernel::open(file, key) else { return };
    if kernel.shape().size <= 64 << 20 {
        let mut memory = vec![0; kernel.shape().size as usize];
        kernel.load(&VolatileSlice::from(&mut memory[..]), 2 << 20).expect("it was checked");
    }
}
