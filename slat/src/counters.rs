//! KVM's own statistics, read without privileges through `KVM_GET_STATS_FD`
//! (kernel: Documentation/virt/kvm/api.rst, 4.133).
//!
//! A virtual machine and each vCPU give a file of a header, a block of
//! descriptors and a block of data. Statistics that this code never heard of
//! are kept by name; those it knows and a kernel lacks are simply absent.

pub mod pmu;
pub mod reasons;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_LINEAR_HIST, KVM_STATS_TYPE_MASK, kvm_stats_desc,
    kvm_stats_header,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::ioctl;

mod request {
    #![allow(missing_docs, reason = "the macro makes a public function and takes no comment")]
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// No kernel has this many statistics; a file that says so is not one.
const MOST_STATISTICS: u32 = 4096;
/// The kernel's names are 48 bytes long.
const LONGEST_NAME: u32 = 1024;

/// Why statistics could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel is older than 5.14, or this is not a KVM file.
    #[error("this kernel gives no KVM statistics (KVM_GET_STATS_FD, Linux 5.14 and later): {0}")]
    Unsupported(std::io::Error),
    /// Reading the file failed.
    #[error("cannot read KVM's statistics: {0}")]
    Read(#[from] std::io::Error),
    /// The header makes no sense.
    #[error("KVM's statistics have a header that makes no sense: {0}")]
    Header(String),
}

/// One statistic's place and kind.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Descriptor {
    name: String,
    /// Of the first value in the data block, in bytes.
    offset: u64,
    values: u16,
    cumulative: bool,
    /// Histograms are left out of [`Counts`].
    plain: bool,
}

/// The statistics file of one virtual machine or vCPU.
#[derive(Debug)]
pub struct Counters {
    file: File,
    data_offset: u64,
    descriptors: Vec<Descriptor>,
}

/// Statistics by name at one moment, or the difference of two moments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counts(pub BTreeMap<String, u64>);

fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn header(bytes: &[u8]) -> Option<kvm_stats_header> {
    let field = |n: usize| word(bytes, n * 4).map(u32::from_ne_bytes);
    Some(kvm_stats_header {
        flags: field(0)?,
        name_size: field(1)?,
        num_desc: field(2)?,
        id_offset: field(3)?,
        desc_offset: field(4)?,
        data_offset: field(5)?,
    })
}

/// One descriptor; `None` where the bytes are too few.
fn descriptor(bytes: &[u8]) -> Option<Descriptor> {
    let flags = u32::from_ne_bytes(word(bytes, 0)?);
    let values = u16::from_ne_bytes(word(bytes, 6)?);
    let offset = u32::from_ne_bytes(word(bytes, 8)?);
    let name = bytes.get(size_of::<kvm_stats_desc>()..)?;
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    let kind = flags & KVM_STATS_TYPE_MASK;
    Some(Descriptor {
        name: String::from_utf8_lossy(name).into_owned(),
        offset: u64::from(offset),
        values,
        cumulative: kind == KVM_STATS_TYPE_CUMULATIVE,
        plain: kind < KVM_STATS_TYPE_LINEAR_HIST && values > 0,
    })
}

impl Counters {
    /// Opens the statistics of a virtual machine or a vCPU.
    ///
    /// # Errors
    /// Where the kernel has none, or the file can't be read or understood.
    pub fn open(kvm: &impl AsRawFd) -> Result<Self, Error> {
        // SAFETY: the ioctl takes no argument and touches none of our memory.
        let fd = unsafe { ioctl(kvm, request::KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(Error::Unsupported(std::io::Error::last_os_error()));
        }
        // SAFETY: the kernel just made this descriptor, and nobody else has it.
        Self::read_layout(unsafe { File::from_raw_fd(fd) })
    }

    fn read_layout(file: File) -> Result<Self, Error> {
        let mut bytes = [0; size_of::<kvm_stats_header>()];
        file.read_exact_at(&mut bytes, 0)?;
        let header = header(&bytes).ok_or_else(|| Error::Header("it is too short".into()))?;
        if header.num_desc > MOST_STATISTICS || header.name_size > LONGEST_NAME {
            return Err(Error::Header(format!(
                "{} statistics with names of {} bytes",
                header.num_desc, header.name_size
            )));
        }
        let size = size_of::<kvm_stats_desc>() + header.name_size as usize;
        let mut block = vec![0; size * header.num_desc as usize];
        file.read_exact_at(&mut block, u64::from(header.desc_offset))?;
        let descriptors = block.chunks_exact(size).filter_map(descriptor).collect();
        Ok(Self { file, data_offset: u64::from(header.data_offset), descriptors })
    }

    /// Every plain statistic as it stands now.
    ///
    /// # Errors
    /// Where the file can't be read, for example because its VM is gone.
    pub fn read(&self) -> Result<Counts, Error> {
        let end = self.descriptors.iter().map(|d| d.offset + u64::from(d.values) * 8).max().unwrap_or(0);
        // Offsets are 32 bits of a structure in the kernel: a few KiB in truth.
        if end > 1 << 20 {
            return Err(Error::Header(format!("data of {end} bytes")));
        }
        let mut data = vec![0; end as usize];
        self.file.read_exact_at(&mut data, self.data_offset)?;
        let counts = self.descriptors.iter().filter(|d| d.plain).filter_map(|d| {
            let value = word(&data, d.offset as usize).map(u64::from_ne_bytes)?;
            Some((d.name.clone(), value))
        });
        Ok(Counts(counts.collect()))
    }

    /// Names of the statistics that only ever grow.
    pub fn cumulative(&self) -> impl Iterator<Item = &str> {
        self.descriptors.iter().filter(|d| d.cumulative).map(|d| d.name.as_str())
    }
}

impl Counts {
    /// A statistic; `None` where this kernel does not have it.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// What was added since `earlier`; statistics that shrank count as nothing.
    pub fn since(&self, earlier: &Self) -> Self {
        let grown =
            |(name, now): (&String, &u64)| (name.clone(), now.saturating_sub(earlier.get(name).unwrap_or(0)));
        Self(self.0.iter().map(grown).collect())
    }

    /// Adds another's counts to these, name by name.
    pub fn add(&mut self, other: &Self) {
        for (name, count) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
    }

    /// VM exits that the guest's own work caused: all, but for those by which
    /// the host took its CPU back (`irq_exits`) and those of the
    /// payload's doorbell (`io_exits`).
    pub fn exits(&self) -> Option<u64> {
        let beside: u64 =
            ["irq_exits", "io_exits"].iter().filter_map(|name| self.get(name)).fold(0, u64::saturating_add);
        Some(self.get("exits")?.saturating_sub(beside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A file as the kernel lays it out, with these statistics: name, flags, offset, value.
    fn file(statistics: &[(&str, u32, u32, u64)]) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let mut descriptors = Vec::new();
        let mut data = vec![0u8; 256];
        for (name, flags, offset, value) in statistics {
            descriptors.extend(flags.to_ne_bytes());
            descriptors.extend([0, 0]);
            descriptors.extend(1u16.to_ne_bytes());
            descriptors.extend(offset.to_ne_bytes());
            descriptors.extend([0; 4]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(48, 0);
            descriptors.extend(padded);
            data[*offset as usize..*offset as usize + 8].copy_from_slice(&value.to_ne_bytes());
        }
        let data_offset = 24 + descriptors.len() as u32;
        for field in [0, 48, statistics.len() as u32, 24, 24, data_offset] {
            file.write_all(&field.to_ne_bytes()).expect("write");
        }
        file.write_all(&descriptors).expect("write");
        file.write_all(&data).expect("write");
        file
    }

    #[test]
    fn reads_known_and_unknown_statistics() {
        let file = file(&[("exits", 0, 0, 12), ("invented_tomorrow", 1, 24, 5), ("halt_hist", 4, 8, 9)]);
        let counters = Counters::read_layout(file).expect("a layout");
        let counts = counters.read().expect("counts");
        assert_eq!(counts.get("exits"), Some(12));
        assert_eq!(counts.get("invented_tomorrow"), Some(5));
        assert_eq!(counts.get("halt_hist"), None, "a histogram is no count");
        assert_eq!(counters.cumulative().collect::<Vec<_>>(), ["exits"]);
    }

    #[test]
    fn refuses_a_header_that_makes_no_sense() {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&[0xff; 64]).expect("write");
        assert!(matches!(Counters::read_layout(file), Err(Error::Header(_))));
        let empty = tempfile::tempfile().expect("a temporary file");
        assert!(matches!(Counters::read_layout(empty), Err(Error::Read(_))));
    }

    #[test]
    fn the_hosts_own_exits_are_not_the_guests() {
        let counts = |list: &[(&str, u64)]| Counts(list.iter().map(|(n, v)| ((*n).into(), *v)).collect());
        let before = counts(&[("exits", 10), ("irq_exits", 2), ("io_exits", 1)]);
        let after = counts(&[("exits", 120), ("irq_exits", 5), ("io_exits", 2)]);
        assert_eq!(after.since(&before).exits(), Some(106));
        assert_eq!(counts(&[]).exits(), None);
    }

    #[test]
    fn a_real_machine_and_vcpu_have_statistics() {
        let Some(kvm) = crate::host::kvm_for_tests() else { return };
        let vm = kvm.create_vm().expect("a VM");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let of_vm = Counters::open(&vm).expect("the VM's counters").read().expect("counts");
        let of_vcpu = Counters::open(&vcpu).expect("the vCPU's counters").read().expect("counts");
        assert!(of_vm.get("pages_4k").is_some(), "{of_vm:?}");
        assert_eq!(of_vcpu.get("exits"), Some(0), "{of_vcpu:?}");
        println!("{of_vm:?}\n{of_vcpu:?}");
    }
}
