//! x86-64: the guest's address map, its tables, its processors' first state.

pub mod acpi;
pub mod cpuid;
pub mod layout;
pub mod registers;
pub mod reset;
pub mod smbios;
pub mod vcpu;
