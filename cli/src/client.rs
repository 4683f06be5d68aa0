//! Asking VMs.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

pub use api::client::Error;
use api::client::{Client, raise_descriptor_limit};
use api::runtime;
use tokio::runtime::{Builder, Runtime};

use crate::failure::Failure;

/// More descriptors than an event loop takes. tokio (1.54) panics where it gets none for signals, so it begins
/// only where all can be had.
const DESCRIPTORS: usize = 8;

/// The VM that `name` names; nobody has spoken to it yet.
///
/// # Errors
/// No such name, no runtime directory, or no VM of that name.
pub fn named(name: &str) -> Result<Client, Failure> {
    let socket = runtime::socket(name)?;
    let exists = socket.try_exists().map_err(|error| {
        Failure::new(format!("cannot look for the VM `{name}` at {}: {error}", socket.display()))
    })?;
    if !exists {
        return Err(Failure::new(unknown(name, &socket)));
    }
    Ok(Client::new(socket))
}

fn unknown(name: &str, socket: &Path) -> String {
    format!(
        "there is no VM `{name}` ({} does not exist): `ballast ps` lists those that run",
        socket.display()
    )
}

/// Runs `work` to its end on this thread.
///
/// # Errors
/// What `work` returns, or that the kernel gave no event loop.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    raise_descriptor_limit();
    event_loop()?.block_on(work)
}

/// An event loop for this thread.
///
/// # Errors
/// The kernel gives none.
pub fn event_loop() -> Result<Runtime, Failure> {
    let descriptors: io::Result<Vec<_>> = (0..DESCRIPTORS / 2).map(|_| UnixStream::pair()).collect();
    let built = descriptors.and_then(|free| {
        drop(free);
        Builder::new_current_thread().enable_all().build()
    });
    built.map_err(|error| Failure::new(format!("cannot start an event loop: {error}")))
}
