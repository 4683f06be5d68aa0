//! One virtual machine in one process.

pub mod agent;
pub mod api_server;
pub mod arch;
pub mod boot;
pub mod bus;
pub mod config;
pub mod console;
pub mod control;

pub mod crew;
mod events;
pub mod exit;
pub mod feed;
pub mod host;
pub mod inspect;
pub mod life;
pub mod machine;
pub mod memory;
pub mod pluggable;
pub mod sandbox;
mod signals;
mod steering;
mod terminal;
mod trespass;
pub mod vcpu;
pub mod wiring;
