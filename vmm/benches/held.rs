//! What it costs to ask what the host holds of 1 GiB of small and of huge pages: `cargo bench -p vmm --bench held`.

use std::time::Instant;

use api::units::Bytes;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::config::MemoryOptions;
use vmm::memory::Ram;

fn main() {
    // Not when tests are run.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    for thp in [false, true] {
        let ram = Ram::new(Bytes::gib(1), MemoryOptions { thp, ..Default::default() }).expect("1 GiB");
        if !thp {
            for region in ram.regions() {
                // SAFETY: the range is this program's own mapping; the advice takes nothing away.
                unsafe { libc::madvise(region.host.cast(), region.size.0 as usize, libc::MADV_NOHUGEPAGE) };
            }
        }
        for page in 0..Bytes::gib(1).pages().0 {
            ram.guest().write_obj(1u8, GuestAddress(page * 4096)).expect("it is mapped");
        }
        let begun = Instant::now();
        let held = ram.held().expect("the kernel's accounts");
        println!("{held:?} took {:?}", begun.elapsed());
    }
}
