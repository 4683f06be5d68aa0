//! What the guest is told of the machine that it runs on: SMBIOS (DMTF DSP0134, version 3.7), as a BIOS would leave it.
//!
//! cloud-init and systemd tell machines apart by it, and users read it in `/sys/class/dmi/id`. Tables are what
//! Linux expects at least: BIOS, system, baseboard, chassis.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout;
use crate::config::Name;

// Types (section 7).
const BIOS: u8 = 0;
const SYSTEM: u8 = 1;
const BASEBOARD: u8 = 2;
const CHASSIS: u8 = 3;
const END: u8 = 127;

/// What a structure says where nothing is known.
const UNKNOWN: u8 = 2;

/// Bytes of the entry point (section 5.2.2).
const ENTRY_POINT: usize = 24;
/// Of a structure's header: type, length, handle.
const HEADER: usize = 4;

/// Puts structures behind each other (section 6.1).
struct Table {
    bytes: Vec<u8>,
    structures: u16,
}

impl Table {
    /// Adds one; `fields` come behind its header and name strings by their numbers, from 1 on.
    fn add(&mut self, kind: u8, fields: &[u8], strings: &[&str]) {
        // Fields are some twenty bytes.
        let length = (HEADER + fields.len()) as u8;
        self.bytes.extend([kind, length]);
        self.bytes.extend(self.structures.to_le_bytes());
        self.bytes.extend(fields);
        for string in strings {
            self.bytes.extend(string.bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.structures = self.structures.saturating_add(1);
    }
}

/// The serial number and the UUID of the VM called `name`: the same each time.
fn identity(name: &Name) -> (String, [u8; 16]) {
    let hash =
        blake3::derive_key("ballast 2026 SMBIOS identity of a VM by its name", name.as_str().as_bytes());
    let mut uuid = [0; 16];
    for (byte, value) in uuid.iter_mut().zip(hash) {
        *byte = value;
    }
    // As text, version and variant lie in the digits where RFC 9562 has them: version 8, of a maker's own way. The
    // first three fields are little-endian (section 7.2.1), so that the version is in byte 7.
    uuid[7] = uuid[7] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    let serial = hash.iter().skip(16).take(8).map(|byte| format!("{byte:02x}")).collect();
    (serial, uuid)
}

fn table(name: &Name) -> Table {
    let (serial, uuid) = identity(name);
    let version = env!("CARGO_PKG_VERSION");
    let mut table = Table { bytes: Vec::new(), structures: 0 };
    // Section 7.1: vendor, version, no segment; date; size; characteristics: none is supported (bit 3), and in the
    // second extension byte: it is a virtual machine (bit 4); releases unknown.
    let mut bios = vec![1, 2, 0, 0, 3, 0];
    bios.extend((1u64 << 3).to_le_bytes());
    bios.extend([0, 1 << 4, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    table.add(BIOS, &bios, &["ballast", version, "01/01/2026"]);
    // Section 7.2: maker, product, version, serial, UUID, woken by its power switch; SKU and family: none.
    let mut system = vec![1, 2, 3, 4];
    system.extend(uuid);
    system.extend([6, 0, 0]);
    table.add(SYSTEM, &system, &["ballast", "ballast virtual machine", version, &serial]);
    // Section 7.3: maker, product, version, serial, no tag; a hosting board; in chassis 3; a motherboard.
    let board = [1, 2, 3, 4, 0, 1, 0, 3, 0, 10, 0];
    table.add(BASEBOARD, &board, &["ballast", "virtual board", version, &serial]);
    // Section 7.4: maker, "other", version, serial, no tag; states unknown; no heights, cords or parts; no SKU.
    let chassis = [1, 1, 2, 3, 0, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    table.add(CHASSIS, &chassis, &["ballast", version, &serial]);
    table.add(END, &[], &[]);
    table
}

fn entry_point(length: u32) -> [u8; ENTRY_POINT] {
    let mut entry = [0; ENTRY_POINT];
    let parts: [&[u8]; 7] = [
        b"_SM3_",
        // The sum, later; length; version 3.7.0 of the specification; revision 1 of this structure.
        &[0, ENTRY_POINT as u8, 3, 7, 0, 1],
        &[0],
        &length.to_le_bytes(),
        &TABLE.0.to_le_bytes(),
        &[],
        &[],
    ];
    for (byte, value) in entry.iter_mut().zip(parts.into_iter().flatten()) {
        *byte = *value;
    }
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

/// The structures lie behind the entry point.
const TABLE: GuestAddress = GuestAddress(layout::SMBIOS.0 + 0x20);

/// Writes entry point and structures into guest memory, at [`layout::SMBIOS`].
///
/// # Errors
/// When guest memory refuses the write.
pub fn write(memory: &GuestMemoryMmap, name: &Name) -> Result<(), vm_memory::GuestMemoryError> {
    let bytes = table(name).bytes;
    // A name has 63 bytes at most, so that all of it is some hundred.
    memory.write_slice(&entry_point(bytes.len() as u32), layout::SMBIOS)?;
    memory.write_slice(&bytes, TABLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::reset;

    /// Structures by their type, with their fields and strings.
    fn read(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (formatted, rest) = bytes.split_at(usize::from(bytes[1]));
            let end = rest.windows(2).position(|pair| pair == [0, 0]).expect("an end");
            let strings = rest[..end].split(|byte| *byte == 0).filter(|text| !text.is_empty());
            let strings = strings.map(|text| String::from_utf8(text.to_vec()).expect("text")).collect();
            all.push((formatted[0], formatted[4..].to_vec(), strings));
            bytes = &rest[end + 2..];
        }
        all
    }

    #[test]
    fn the_tables_can_be_found_and_read() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("guest memory");
        let name: Name = "web".parse().expect("a name");
        write(&memory, &name).expect("written");
        reset::write(&memory).expect("written");
        let mut entry = [0; ENTRY_POINT];
        memory.read_slice(&mut entry, layout::SMBIOS).expect("read");
        assert_eq!(&entry[..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let length = u32::from_le_bytes(entry[12..16].try_into().expect("four")) as usize;
        let at = u64::from_le_bytes(entry[16..].try_into().expect("eight"));
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(at)).expect("read");
        let all = read(&bytes);
        assert_eq!(all.iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(), [0, 1, 2, 3, 127]);
        // Lengths of version 3: 7.1, 7.2, 7.3 with one byte of contained handles, 7.4 with the SKU.
        let lengths: Vec<_> = all.iter().map(|(_, fields, _)| fields.len() + HEADER).collect();
        assert_eq!(lengths, [26, 27, 15, 22, 4]);
        assert_eq!(all[1].2[1], "ballast virtual machine");
        // Where Linux looks, 16 bytes apart; and no BIOS is found whose vector they would lie over.
        const { assert!(layout::SMBIOS.0 >= 0xf_0000 && layout::SMBIOS.0.is_multiple_of(16)) };
        assert!(at + (length as u64) < 0xf_fff0);
    }

    #[test]
    fn a_vm_is_the_same_machine_each_time_and_no_other() {
        let of = |name: &str| identity(&name.parse().expect("a name"));
        assert_eq!(of("web"), of("web"));
        assert_ne!(of("web").0, of("db").0);
        assert_ne!(of("web").1, of("db").1);
        let (serial, uuid) = of("web");
        assert_eq!(serial.len(), 16);
        assert_eq!((uuid[7] >> 4, uuid[8] >> 6), (8, 2));
    }
}
