//! Devices of the PC platform that are not virtio: what a guest finds at fixed ports.

pub mod acpi_power;
pub mod i8042;
pub mod pvpanic;
pub mod reset_control;
pub mod serial;
pub mod sleep_note;

use std::sync::Arc;

/// How a guest asks for the end of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It has switched itself off.
    PowerOff,
    /// It wants to start anew.
    Reset,
    /// Its kernel has panicked.
    Panic,
}

/// What is called when a guest asks for its end. It comes on a vCPU's thread, and may come again.
pub type OnEnd = Arc<dyn Fn(GuestEnd) + Send + Sync>;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use vm_device::DevicePio;
    use vm_device::bus::PioAddress;

    use super::*;

    /// A list of what a guest asked for, and who adds to it.
    fn listen() -> (Arc<Mutex<Vec<GuestEnd>>>, OnEnd) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&heard);
        (heard, Arc::new(move |end| list.lock().expect("no test panics with it").push(end)))
    }

    fn devices(on_end: &OnEnd) -> [Box<dyn DevicePio>; 4] {
        [
            Box::new(pvpanic::PvPanic::new(on_end.clone())),
            Box::new(acpi_power::AcpiPower::new(on_end.clone())),
            Box::new(i8042::ResetLine::new(on_end.clone())),
            Box::new(reset_control::ResetControl::new(on_end.clone())),
        ]
    }

    #[test]
    fn each_way_out_is_told() {
        let (heard, on_end) = listen();
        let [panic, power, keyboard, control] = devices(&on_end);
        for (device, offset, before, value, end) in [
            (&panic, 0, 2, 1, GuestEnd::Panic),
            (&power, 0, 0x30, 0x34, GuestEnd::PowerOff),
            (&power, 2, 0, 1, GuestEnd::Reset),
            (&keyboard, 0, 0xff, 0xfe, GuestEnd::Reset),
            (&control, 0, 0x02, 0x06, GuestEnd::Reset),
        ] {
            device.pio_write(PioAddress(0), offset, &[before]);
            assert_eq!(heard.lock().unwrap().as_slice(), [], "{end:?}");
            device.pio_write(PioAddress(0), offset, &[value]);
            assert_eq!(std::mem::take(&mut *heard.lock().unwrap()), [end]);
        }
    }

    proptest! {
        #[test]
        fn accesses_wider_than_a_register_do_nothing(
            offset in 0u16..4, mut data in prop::collection::vec(any::<u8>(), 2..16)
        ) {
            let (heard, on_end) = listen();
            for device in devices(&on_end) {
                device.pio_write(PioAddress(0), offset, &data);
                device.pio_read(PioAddress(0), offset, &mut data);
                prop_assert!(data.iter().all(|byte| *byte == 0xff));
            }
            prop_assert!(heard.lock().unwrap().is_empty());
        }
    }
}
