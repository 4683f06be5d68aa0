//! The first process of an emulated host, and what it shares with those who start it.
//!
//! A program becomes such a process by calling [`host::main`]: the lab's own init does, and `ballast`,
//! which is all that `ballast slat lab` has at hand. [`job`] is what it is told, [`results`] what it hands out.

pub mod host;
pub mod job;
pub mod modules;
pub mod results;
pub mod system;
