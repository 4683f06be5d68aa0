//! A VM's shared directories, for who looks at them.

use std::sync::Arc;

use api::status::ShareStatus;
use devices::virtio::fs::Service;

use super::Control;
use crate::config::{DeviceId, ShareOptions};

/// A directory that is shared.
pub struct Share {
    /// What it is called in its VM.
    pub id: DeviceId,
    /// What was asked for.
    pub options: ShareOptions,
    /// What becomes of the processes that do the work.
    pub service: Arc<Service>,
}

impl Control {
    /// Its shared directories.
    pub(super) fn shares(&self) -> Vec<ShareStatus> {
        self.parts.get().map_or_else(Vec::new, |parts| parts.shares.iter().map(status).collect())
    }
}

fn status(share: &Share) -> ShareStatus {
    let Share { id, options, service } = share;
    ShareStatus {
        id: id.as_str().to_owned(),
        path: options.path.to_string_lossy().into_owned(),
        tag: options.tag(id).to_owned(),
        readonly: options.readonly,
        serves: service.serves(),
        restarts: service.restarts(),
    }
}
