//! How VMs say they are, for lists of what they have.

use std::path::PathBuf;
use std::time::Duration;

use api::client::Client;
use api::runtime;
use api::status::VmStatus;

use crate::failure::Failure;
use crate::{client, sentence};

/// How long a VM may take to say what it has.
const PATIENCE: Duration = Duration::from_secs(1);

/// The VM of this name, or all of the runtime directory, which is returned as well. One of all that does not answer is
/// named on standard error.
///
/// # Errors
/// There is no such VM, or the one that is named does not answer.
pub fn of(name: Option<&str>) -> Result<(PathBuf, Vec<VmStatus>), Failure> {
    let directory = runtime::directory()?;
    let clients = match name {
        Some(name) => vec![client::named(name)?],
        None => runtime::sockets(&directory)?.into_iter().map(|(_, socket)| Client::new(socket)).collect(),
    };
    let vms = client::block_on(async {
        let mut vms = Vec::with_capacity(clients.len());
        for client in clients {
            match client.with_timeout(PATIENCE).status().await {
                Ok(vm) => vms.push(vm),
                Err(error) if name.is_some() => return Err(error.into()),
                Err(error) => sentence::say(error),
            }
        }
        Ok(vms)
    })?;
    Ok((directory, vms))
}
