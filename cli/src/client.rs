//! Asking VMs.

use std::path::Path;

pub use api::client::Error;
use api::client::{Client, raise_descriptor_limit};
use api::runtime;

use crate::failure::Failure;

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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::new(format!("cannot start an event loop: {error}")))?.block_on(work)
}
