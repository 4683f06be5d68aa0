//! The registers with which the first vCPU enters the kernel.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestMemoryMmap};

use crate::arch::x86_64::layout;
use crate::boot::kernel::Entry;

// SDM volume 3, section 2.5.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
// SDM volume 3, section 4.5.
const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;

/// General registers at the entry.
pub fn general(entry: Entry) -> kvm_regs {
    // Bit 1 of RFLAGS is always set (SDM volume 1, section 3.4.3).
    let base = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Linux64(address) => kvm_regs { rip: address.0, rsi: layout::ZERO_PAGE.0, ..base },
        Entry::Pvh(address) => kvm_regs { rip: address.0, rbx: layout::PVH_START_INFO.0, ..base },
    }
}

/// The floating point unit as after a reset (SDM volume 3, table 10-1).
pub fn floating_point() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Segments and control registers at the entry, from those of a reset; writes the tables
/// they name into guest memory.
///
/// # Errors
/// When guest memory has no place for the tables.
pub fn special(
    entry: Entry,
    mut sregs: kvm_sregs,
    memory: &GuestMemoryMmap,
) -> Result<kvm_sregs, vm_memory::GuestMemoryError> {
    // Linux wants __BOOT_CS (0x10) and __BOOT_DS (0x18) to be flat.
    let code = segment(0x10, SegmentKind::Code { long: matches!(entry, Entry::Linux64(_)) });
    let data = segment(0x18, SegmentKind::Data);
    let task = segment(0x20, SegmentKind::Task);
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (address, entry) in (layout::GDT.0..).step_by(8).zip(gdt) {
        memory.write_obj(entry, vm_memory::GuestAddress(address))?;
    }
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = (gdt.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = task;
    match entry {
        Entry::Linux64(_) => {
            write_page_tables(memory)?;
            sregs.cr3 = layout::PAGE_TABLES.0;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        Entry::Pvh(_) => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
    }
    Ok(sregs)
}

/// Maps the first 4 GiB one to one with pages of 2 MiB.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    let at = |page: u64, index: u64| vm_memory::GuestAddress(layout::PAGE_TABLES.0 + page * 4096 + index * 8);
    let table = PAGE_PRESENT | PAGE_WRITE;
    memory.write_obj(at(1, 0).0 | table, at(0, 0))?;
    for gib in 0..4 {
        memory.write_obj(at(2 + gib, 0).0 | table, at(1, gib))?;
    }
    let mut entries = Vec::with_capacity(4 * 4096);
    for page in 0..4 * 512u64 {
        entries.extend_from_slice(&(page << 21 | table | PAGE_LARGE).to_le_bytes());
    }
    memory.write_slice(&entries, at(2, 0))
}

/// What a segment is for.
enum SegmentKind {
    /// Execute and read.
    Code { long: bool },
    /// Read and write.
    Data,
    /// A busy 32-bit or 64-bit task state segment.
    Task,
}

/// A flat, present segment of ring 0 (SDM volume 3, section 3.4.5).
fn segment(selector: u16, kind: SegmentKind) -> kvm_segment {
    let (type_, s, l, db, limit) = match kind {
        SegmentKind::Code { long } => (0xb, 1, u8::from(long), u8::from(!long), u32::MAX),
        SegmentKind::Data => (0x3, 1, 0, 1, u32::MAX),
        SegmentKind::Task => (0xb, 0, 0, 0, 0x67),
    };
    let g = u8::from(limit == u32::MAX);
    kvm_segment { base: 0, limit, selector, type_, present: 1, dpl: 0, db, s, l, g, ..Default::default() }
}

/// The same segment as the descriptor that the processor would load it from.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff) | (limit >> 16 & 0xf) << 48 | flags << 40
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&segment(0x10, SegmentKind::Code { long: true })), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x10, SegmentKind::Code { long: false })), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x18, SegmentKind::Data)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&segment(0x20, SegmentKind::Task)), 0x0000_8b00_0000_0067);
    }
}
