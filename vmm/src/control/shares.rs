//! A VM's shared directories, for who looks at them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::status::ShareStatus;

use super::Control;
use crate::config::{DeviceId, ShareOptions};

/// A directory that is shared.
pub struct Share {
    /// What it is called in its VM.
    pub id: DeviceId,
    /// What was asked for.
    pub options: ShareOptions,
    /// Whether the process that does the work is there.
    pub serves: Arc<AtomicBool>,
}

impl Control {
    /// Its shared directories.
    pub(super) fn shares(&self) -> Vec<ShareStatus> {
        self.parts.get().map_or_else(Vec::new, |parts| parts.shares.iter().map(status).collect())
    }
}

fn status(share: &Share) -> ShareStatus {
    let Share { id, options, serves } = share;
    ShareStatus {
        id: id.as_str().to_owned(),
        path: options.path.to_string_lossy().into_owned(),
        tag: options.tag(id).to_owned(),
        readonly: options.readonly,
        serves: serves.load(Ordering::Relaxed),
    }
}
