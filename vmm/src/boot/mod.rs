//! From a kernel file to a first vCPU that is ready to run it.

pub mod acpi;
pub mod kernel;
pub mod layout;
pub mod registers;
pub mod reset;
