//! Bodies of tests that run on more than one kind of host. Each panics where what it checks is not so.

#![allow(clippy::missing_panics_doc, reason = "they are for nothing else")]

pub mod balloon;
pub mod boot;
pub mod plug;
pub mod slat;
