//! Pauses the VM for disks that the host fails.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::events::Subscriber;
use devices::virtio::block::handle::Handle;
use event_manager::{EventOps, EventSet, Events, Result as EventResult};

use crate::control::Control;

/// Hears of disks of which requests wait that the host could not do.
pub struct DiskFailures {
    control: Arc<Control>,
    disks: Vec<Handle>,
}

impl DiskFailures {
    /// Of these disks.
    pub fn new(control: &Arc<Control>, disks: Vec<Handle>) -> Self {
        Self { control: Arc::clone(control), disks }
    }
}

impl Subscriber for DiskFailures {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        for (number, disk) in (0..).zip(&self.disks) {
            ops.add(Events::with_data_raw(disk.failed().as_raw_fd(), number, EventSet::IN))?;
        }
        Ok(())
    }

    fn process(&mut self, events: Events, _: &mut EventOps) -> EventResult<()> {
        let disk = usize::try_from(events.data()).ok().and_then(|number| self.disks.get(number));
        if let Some(disk) = disk {
            let _ = disk.failed().read();
            self.control.disk_failed(disk);
        }
        Ok(())
    }
}
