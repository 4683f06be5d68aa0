//! A VM's disks, for who looks at them and who makes them larger.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use api::agent::EventKind;
use api::status::{DiskCount, DiskStatus, Pauser, ResizeRequest};
use api::units::Bytes;
use devices::virtio::block::handle::{Count, Counts, GrowError, Handle};

use super::{Control, ControlError};
use crate::state;

/// How long somebody waits for a disk to become larger.
pub const PATIENCE: Duration = Duration::from_secs(30);

impl Control {
    /// Its disks.
    pub(super) fn disks(&self) -> Vec<DiskStatus> {
        self.parts.get().map_or_else(Vec::new, |parts| parts.disks.iter().map(status).collect())
    }

    /// Pauses the VM for a disk of which a request waits that the host could not do, and says so.
    pub fn disk_failed(&self, disk: &Handle) {
        // It may go on already.
        let Some(failure) = disk.failure() else { return };
        if self.change(|state| state::pause(state, Pauser::Disk)).is_err() {
            return;
        }
        let (name, id) = (self.name.as_str(), disk.id());
        tracing::error!(
            event = "disk-failed",
            "{name} is paused, as the host could not do what its guest asked of {id}: {failure}, then let it go on \
             with `ballast resume {name}`"
        );
        self.events.push(EventKind::DiskFailed, self.agent_status());
    }

    /// Has a disk become larger, and its guest told. What came of it is got from what this returns, by whoever has
    /// waited so long; whoever listens to the event stream is woken when it is there.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`], [`ControlError::DiskSize`]; [`ControlError::Host`] where the host can't.
    pub fn resize_disk(
        &self,
        request: &ResizeRequest,
    ) -> Result<impl FnMut(Duration) -> Option<Result<(), ControlError>> + use<>, ControlError> {
        let parts = self.parts("have a larger disk")?;
        let disk = parts.disks.iter().find(|disk| disk.id() == request.disk).ok_or_else(|| {
            let known: Vec<_> = parts.disks.iter().map(Handle::id).collect();
            ControlError::NoSuchDisk { asked: request.disk.clone(), known: known.join(", ") }
        })?;
        let refused = |error: GrowError| match error {
            GrowError::Host { .. } => ControlError::Host(error.to_string()),
            error => ControlError::DiskSize(error.to_string()),
        };
        let (sender, grown) = mpsc::sync_channel(1);
        let events = Arc::clone(&self.events);
        let done = move |outcome: Result<(), GrowError>| {
            // Whoever asked may have given up by now.
            let _ = sender.send(outcome.map_err(refused));
            events.wake();
        };
        disk.grow(request.size.0, done).map_err(refused)?;
        let id = request.disk.clone();
        Ok(move |waited| match grown.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(mpsc::TryRecvError::Empty) if waited < PATIENCE => None,
            Err(_) => Some(Err(ControlError::Host(format!(
                "the disk {id} is not larger yet: the host's storage takes its time, and `ballast ps --json` shows \
                 the size when it has"
            )))),
        })
    }
}

fn status(disk: &Handle) -> DiskStatus {
    let Counts { reads, writes, cleared, flushes, errors, limited, limited_for } = disk.counts();
    let count = |Count { operations, bytes }| DiskCount { operations, bytes: Bytes(bytes) };
    DiskStatus {
        id: disk.id().to_owned(),
        size: Bytes(disk.size()),
        read_only: disk.is_read_only(),
        reads: count(reads),
        writes: count(writes),
        cleared: count(cleared),
        flushes,
        errors,
        limited,
        limited_ms: u64::try_from(limited_for.as_millis()).unwrap_or(u64::MAX),
        failure: disk.failure(),
    }
}
