//! What lies where in the micro-VM's memory: descriptors, tables, code, parameters.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::chain::chain;
use super::code::{self, Label, Params};
use super::failure::{Failure, memory_error};
use super::tables::{self, Tables};
use super::{Between, Payload, Place, Setup};
use crate::walk::PageSize;
use api::units::Bytes;

pub(super) const GDT: GuestAddress = GuestAddress(0x1000);
pub(super) const IDT: GuestAddress = GuestAddress(0x2000);
pub(super) const PARAMS: u64 = 0x3000;
pub(super) const PARAMS_SIZE: u64 = 0x100;
const ROOTS: GuestAddress = GuestAddress(0x4000);
/// Where the code of all payloads begins.
pub(super) const CODE: u64 = 0x8000;
pub(super) const STACKS: u64 = 0x1_0000;
pub(super) const STACK_SIZE: u64 = 0x1000;
const TABLES: GuestAddress = GuestAddress(0x10_0000);
/// Guest physical address of the data: aligned for every page size.
pub const DATA: u64 = 1 << 30;
/// Virtual addresses that page-table payloads map and unmap: a table a vCPU.
pub(super) const WINDOW: u64 = 1 << 39;
/// Virtual address of the data, in a slot of the root table of its own.
pub const DATA_ADDRESS: u64 = 1 << 40;
const WINDOW_SIZE: u64 = 2 << 20;
const CHURN_PAGES: u64 = 64;
/// From a page of the window to the other frame that churn gives it.
const OTHER_FRAME: u64 = 1 << 20;

/// How many table pages a setup can need, but for those over the low memory.
fn table_count(setup: &Setup, data: u64) -> u64 {
    let spaces = if setup.payload == Payload::Spaces { setup.roots } else { 1 };
    let last = if setup.guest_page == PageSize::Size4K { data.div_ceil(2 << 20) } else { 0 };
    spaces * (last + data.div_ceil(1 << 30) + 2) + setup.roots + setup.vcpus + 16
}

/// Memory below the data: what comes before the tables, and those.
pub(super) fn low_memory(setup: &Setup) -> Bytes {
    let tables = table_count(setup, data_size(setup).0);
    // The low memory needs tables too: one for 2 MiB of it, and it grows by them.
    Bytes((TABLES.0 + (tables + tables.div_ceil(256) + 16) * 4096).next_multiple_of(2 << 20))
}

/// The data of all vCPUs.
pub(super) fn data_size(setup: &Setup) -> Bytes {
    Bytes(setup.data.0.saturating_mul(setup.vcpus))
}

/// Fills a machine's memory.
pub(super) struct Layout<'a> {
    /// The memory.
    pub(super) memory: &'a GuestMemoryMmap,
    /// What is to run there.
    pub(super) setup: &'a Setup,
}

impl Layout<'_> {
    pub(super) fn write(&self, value: u64, at: u64) -> Result<(), Failure> {
        self.memory.write_obj(value, GuestAddress(at)).map_err(memory_error)
    }

    /// Writes everything that the payload needs; gives the root of the tables.
    pub(super) fn fill(&self) -> Result<GuestAddress, Failure> {
        let (low, data) = (low_memory(self.setup).0, data_size(self.setup).0);
        self.memory.write_slice(code::bytes(), GuestAddress(CODE)).map_err(memory_error)?;
        // Null, code and data of ring 0, code and data of ring 3: flat, 64-bit (SDM volume 3, 3.4.5).
        let descriptors: [u64; 5] =
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];
        for (i, descriptor) in (0..).zip(descriptors) {
            self.write(descriptor, GDT.0 + i * 8)?;
        }
        // One gate: vector 14, interrupt gate, ring 0 (SDM volume 3, 6.14.1).
        let handler = CODE + Label::PageFault.offset();
        self.write((handler & 0xffff) | 0x8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48, IDT.0 + 14 * 16)?;
        let setup = self.setup;
        let mut tables = Tables::new(self.memory, TABLES, (low - TABLES.0) / 4096);
        let root = tables.table()?;
        tables.map(root, 0, 0, low, PageSize::Size4K)?;
        tables.map(root, DATA_ADDRESS, DATA, data, setup.guest_page)?;
        for vcpu in 0..setup.vcpus {
            window(self.memory, &mut tables, root, setup, vcpu)?;
        }
        for i in 0..setup.roots {
            let copy = if i == 0 { root } else { tables.table()? };
            let slot = |address: u64| (address >> 39 & 0x1ff) * 8;
            for address in [0, WINDOW, DATA_ADDRESS] {
                let entry: u64 =
                    self.memory.read_obj(GuestAddress(root.0 + slot(address))).map_err(memory_error)?;
                self.write(entry, copy.0 + slot(address))?;
            }
            if setup.payload == Payload::Spaces && i > 0 {
                self.write(0, copy.0 + slot(DATA_ADDRESS))?;
                tables.map(copy, DATA_ADDRESS, DATA, data, setup.guest_page)?;
            }
            self.write(copy.0, ROOTS.0 + i * 8)?;
        }
        if matches!(setup.payload, Payload::Chase | Payload::Laps) {
            for own in (0..setup.vcpus).map(|vcpu| vcpu * setup.data.0) {
                let write = |offset, link| self.write(link, DATA + own + offset);
                chain(setup.links(), DATA_ADDRESS + own, write)?;
            }
        }
        (0..setup.vcpus).try_for_each(|vcpu| self.parameters(root, vcpu))?;
        Ok(root)
    }

    fn parameters(&self, root: GuestAddress, vcpu: u64) -> Result<(), Failure> {
        let setup = self.setup;
        let params = Params::default();
        let own = vcpu * setup.data.0;
        let window = WINDOW + vcpu * WINDOW_SIZE;
        let entry = |level| Tables::new(self.memory, TABLES, 0).entry(root, window, level);
        let pages = if setup.payload == Payload::Churn { CHURN_PAGES } else { setup.links() };
        Params::set(&params.op, CODE + setup.payload.label().offset());
        Params::set(&params.warm, setup.warm());
        Params::set(&params.count, setup.operations);
        Params::set(&params.base, DATA_ADDRESS + own);
        Params::set(&params.pages, pages);
        Params::set(&params.stride, PageSize::Size4K.bytes());
        Params::set(&params.window, window);
        Params::set(&params.value, (DATA + own) | tables::LEAF);
        Params::set(&params.other, (DATA + own + OTHER_FRAME) | tables::LEAF);
        if setup.payload == Payload::MmapBatch {
            // The window's table hangs in no entry yet: the payload puts it there.
            let pde = entry(2)?.0;
            let value: u64 = self.memory.read_obj(GuestAddress(pde)).map_err(memory_error)?;
            Params::set(&params.pde, pde);
            Params::set(&params.pde_value, value);
            Params::set(&params.pte, value & !0xfff);
            self.write(0, pde)?;
        } else {
            Params::set(&params.pte, entry(1)?.0);
        }
        Params::set(&params.roots, ROOTS.0);
        Params::set(&params.root_count, setup.roots);
        // Ring 0 may be emulated, by an emulator that has neither lfence nor a clock worth reading.
        let flags = match (setup.payload, setup.between, setup.place) {
            // Laps time themselves.
            (Payload::Laps, Between::Nothing, _) => 0,
            (Payload::Laps, ..) => code::RING_EACH_LAP,
            (_, _, Place::Ring3) => code::TAKE_TSC,
            _ => 0,
        };
        Params::set(&params.flags, flags);
        Params::set(&params.cursor, DATA_ADDRESS + own);
        // SAFETY: Params is plain integers without padding.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const params).cast::<u8>(), size_of::<Params>()) };
        let at = GuestAddress(PARAMS + vcpu * PARAMS_SIZE);
        self.memory.write_slice(bytes, at).map_err(memory_error)
    }
}

/// The tables over one vCPU's window, as its payload wants to find them.
fn window(
    memory: &GuestMemoryMmap,
    tables: &mut Tables<'_>,
    root: GuestAddress,
    setup: &Setup,
    vcpu: u64,
) -> Result<(), Failure> {
    let address = WINDOW + vcpu * WINDOW_SIZE;
    let entry = tables.entry(root, address, 1)?;
    if matches!(setup.payload, Payload::DemandFault | Payload::MmapBatch) {
        return Ok(());
    }
    for page in 0..CHURN_PAGES {
        let frame = DATA + vcpu * setup.data.0 + page * 4096;
        let at = GuestAddress(entry.0 + page * 8);
        memory.write_obj(frame | tables::LEAF, at).map_err(memory_error)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_chases_through_all_of_its_own_data_and_no_other() {
        let setup = Setup { vcpus: 3, data: Bytes::mib(2), ..Setup::usual(Payload::Chase) };
        let size = |bytes: Bytes| bytes.0 as usize;
        let ranges =
            [(GuestAddress(0), size(low_memory(&setup))), (GuestAddress(DATA), size(data_size(&setup)))];
        let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
        Layout { memory: &memory, setup: &setup }.fill().expect("it fits");
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).expect("in memory");
        for vcpu in 0..setup.vcpus {
            let own = DATA_ADDRESS + vcpu * setup.data.0;
            let cursor = PARAMS + vcpu * PARAMS_SIZE + std::mem::offset_of!(Params, cursor) as u64;
            let begin = read(cursor);
            assert_eq!(begin, own, "vCPU {vcpu}");
            let mut pages = std::collections::BTreeSet::new();
            let mut at = begin;
            for _ in 0..setup.links() {
                assert!((own..own + setup.data.0).contains(&at), "vCPU {vcpu}: {at:#x}");
                pages.insert(at / 4096);
                at = read(at - DATA_ADDRESS + DATA);
            }
            assert_eq!((at, pages.len() as u64), (begin, setup.links()), "vCPU {vcpu}");
        }
    }
}
