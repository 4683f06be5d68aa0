//! One virtual machine in one process.

pub mod agent;
pub mod api_server;
pub mod arch;
pub mod boot;
pub mod builder;
pub mod bus;
pub mod config;
pub mod console;
pub mod control;
pub mod event_stream;
mod events;
pub mod exit;
mod helper;
pub mod host;
pub mod inspect;
pub mod kvm;
pub mod machine;
pub mod memory;
mod resources;
pub mod sandbox;
mod signals;
pub mod state;
mod steering;
mod terminal;
pub mod vcpu;
pub mod vcpu_set;
pub mod wiring;
