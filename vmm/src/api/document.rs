//! Holds `resources/openapi.yaml` against the server.

use crate::control::Control;
use balloon::limits::Limits;

/// The control of a VM that is not started; it needs no KVM.
pub fn control() -> Control {
    let limits: Limits = "256M,min=128M,max=1G".parse().unwrap();
    Control::new("test".parse().unwrap(), "2".parse().unwrap(), limits)
}
