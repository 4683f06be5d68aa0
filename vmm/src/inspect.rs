//! What an onlooker may learn of a running VM: where its memory lies, and how a vCPU sees an
//! address. The words of `GET /memory/map` and `POST /vm/translate`.

use api::units::{Bytes, whole};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::memory::Region;

/// `GET /memory/map`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// Guest RAM, in no special order.
    pub regions: Vec<MappedRegion>,
}

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRegion {
    /// Guest physical address of its first byte.
    pub guest: u64,
    /// Where the VM's process has it.
    pub host: u64,
    /// How long it is.
    pub size: Bytes,
}

impl From<&Region> for MappedRegion {
    fn from(region: &Region) -> Self {
        Self { guest: region.guest.0, host: region.host as u64, size: region.size }
    }
}

impl MemoryMap {
    /// Where the VM's process has the byte at a guest physical address; `None` outside RAM.
    pub fn host_address(&self, guest: u64) -> Option<u64> {
        let region = self
            .regions
            .iter()
            .find(|r| guest.checked_sub(r.guest).is_some_and(|offset| offset < r.size.0))?;
        region.host.checked_add(guest - region.guest)
    }
}

/// The body of `POST /vm/translate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TranslateRequest {
    /// Whose view.
    #[serde(default, deserialize_with = "whole")]
    pub cpu: u8,
    /// A guest virtual address.
    #[serde(deserialize_with = "whole")]
    pub address: u64,
}

/// How a vCPU sees an address: its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translation {
    /// Which vCPU.
    pub cpu: u8,
    /// Bit 31: paging is on (SDM volume 3, 2.5).
    pub cr0: u64,
    /// Where the root of its page tables is.
    pub cr3: u64,
    /// Bit 12: five levels.
    pub cr4: u64,
    /// Bit 10: long mode.
    pub efer: u64,
    /// The guest physical address that KVM finds for it (KVM_TRANSLATE); `None` where it is not mapped.
    pub physical: Option<u64>,
}

/// Reads it. As any walk of a processor, this may set accessed bits in the guest's tables.
///
/// # Errors
/// What KVM says.
pub fn translate(vcpu: &VcpuFd, request: TranslateRequest) -> Result<Translation, kvm_ioctls::Error> {
    let registers = vcpu.get_sregs()?;
    let found = vcpu.translate_gva(request.address)?;
    Ok(Translation {
        cpu: request.cpu,
        cr0: registers.cr0,
        cr3: registers.cr3,
        cr4: registers.cr4,
        efer: registers.efer,
        physical: (found.valid != 0).then_some(found.physical_address),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_their_region_and_nowhere_else() {
        let map = MemoryMap {
            regions: vec![
                MappedRegion { guest: 0, host: 0x7000, size: Bytes(0x1000) },
                MappedRegion { guest: 1 << 32, host: u64::MAX - 0xf, size: Bytes(u64::MAX) },
            ],
        };
        assert_eq!(map.host_address(0xfff), Some(0x7fff));
        assert_eq!(map.host_address(0x1000), None);
        assert_eq!(map.host_address((1 << 32) + 0xf), Some(u64::MAX));
        assert_eq!(map.host_address((1 << 32) + 0x10), None);
    }
}
