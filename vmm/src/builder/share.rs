//! Connects shared directories.

use std::sync::Arc;

use devices::virtio::fs::{Fs, QUEUES};
use devices::virtio::vhost_user::{FrontEnd, PATIENCE};

use super::virtiofsd::{self, ShareError, Virtiofsd};
use super::{BuildError, refused};
use crate::config::{ConfigError, DeviceId, ShareOptions};
use crate::helper::Helper;
use crate::memory::Ram;

/// The device `id`, and the process that does its work.
pub fn open(id: &DeviceId, options: &ShareOptions, ram: &Ram) -> Result<(Fs, Arc<Helper>), BuildError> {
    let memory = ram.shared().map_err(refused("guest memory to be shared"))?;
    let memory = memory.ok_or_else(|| ConfigError::ShareOfPrivate(id.clone()))?;
    let Virtiofsd { socket, helper, mut words } = virtiofsd::start(options)?;
    let front_end = FrontEnd::new(socket, &memory, QUEUES, PATIENCE).map_err(|error| {
        // What it has to say it says before its end.
        helper.end();
        ShareError::Unusable { path: options.path.clone(), reason: error.to_string(), said: words.take() }
    })?;
    let helper = Arc::new(helper);
    let (ends, path) = (Arc::clone(&helper), options.path.display().to_string());
    let on_lost = move |reason: &str| {
        // Before anything else: it has the guest's memory.
        ends.end();
        tracing::error!("the guest has lost the shared directory {path}: {reason}; {}", words.take());
    };
    let fs = Fs::new(options.tag(id), front_end, Box::new(on_lost)).map_err(refused("a shared directory"))?;
    Ok((fs, helper))
}
