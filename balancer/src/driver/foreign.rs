//! Everything about the drivers of other VMMs that does not differ from one to another.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use api::limits::{Limits, Wanted};
use api::units::Bytes;

use super::foreign_vm::{ConfiguredLimits, ForeignStatus, ForeignVm};
use super::{Answer, Driver, Error, Status};

/// What differs from one VMM to another: its words. The rest is kept by its driver.
pub trait ForeignDriver: Send {
    /// Where the VM is spoken to.
    fn socket(&self) -> &Path;

    /// The VMM's process, as [`Driver::process`].
    fn process(&self) -> Option<u32>;

    /// What is kept for the VM.
    fn vm(&mut self) -> &mut ForeignVm;

    /// Asks how the VM stands.
    fn look(&mut self) -> impl Future<Output = Result<ForeignStatus, Error>> + Send;

    /// Asks the guest to have `target`.
    fn ask_for(&mut self, target: Bytes) -> impl Future<Output = Result<(), Error>> + Send;
}

impl<V: ForeignDriver> Driver for V {
    fn socket(&self) -> &Path {
        ForeignDriver::socket(self)
    }

    fn process(&self) -> Option<u32> {
        ForeignDriver::process(self)
    }

    /// QEMU and Firecracker ask their guests at an interval of whole seconds, Cloud Hypervisor at each
    /// question: none lets itself be told how long to wait.
    fn report(&mut self, _patience: Duration) -> Answer<'_, Box<Status>> {
        Box::pin(async move {
            let status = self.look().await?;
            Ok(self.vm().status(status).await)
        })
    }

    fn set_target(&mut self, target: Bytes) -> Answer<'_, ()> {
        Box::pin(self.ask_for(target))
    }

    fn set_limits(&mut self, limits: Limits) -> Answer<'_, ()> {
        self.vm().limits.set(limits);
        Box::pin(std::future::ready(Ok(())))
    }

    fn configure(&mut self, memory: Option<Wanted>) {
        self.vm().limits = ConfiguredLimits::new(memory);
    }
}
