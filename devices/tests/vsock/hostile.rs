//! A driver that says anything.

use std::io::Write;
use std::sync::Arc;

use devices::testing::hostile::{any_act, chain_act};
use devices::testing::{Carrier, RUNNING};
use devices::virtio::vsock::{Address, Answers, GUEST_CID, HOST_CID, Operation, Packet};
use proptest::collection::vec;
use proptest::prelude::*;

use super::driver::{Driver, PORT, SERVED, pair};

fn any_operation() -> impl Strategy<Value = Operation> {
    prop::sample::select(vec![
        Operation::Request,
        Operation::Response,
        Operation::Reset,
        Operation::Shutdown,
        Operation::Data,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ])
}

/// Packets that are nearly right, of few ports, with data of few bytes.
fn any_packet() -> impl Strategy<Value = (Packet, Vec<u8>)> {
    let port = prop_oneof![Just(PORT), Just(7), any::<u32>()];
    let host_port = prop_oneof![Just(SERVED), Just(1 << 30), Just((1 << 30) + 1), any::<u32>()];
    let cid = prop_oneof![20 => Just(GUEST_CID), 1 => any::<u64>()];
    let host = prop_oneof![20 => Just(HOST_CID), 1 => any::<u64>()];
    let length = prop_oneof![Just(0_u32), 0..2000_u32, any::<u32>()];
    let number = prop_oneof![Just(0), Just(64 << 10), any::<u32>()];
    let addresses = (cid, port, host, host_port);
    (addresses, any_operation(), length, 0..4_u32, (number.clone(), number), vec(any::<u8>(), 0..2000))
        .prop_map(|((cid, port, host, host_port), operation, length, flags, (buffer, forwarded), data)| {
            let (from, to) = (Address { cid, port }, Address { cid: host, port: host_port });
            (Packet { length, flags, buffer, forwarded, ..Packet::new(from, to, operation) }, data)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Whatever a driver says, the device goes on, and serves the next driver.
    #[test]
    fn no_packet_stops_the_device(packets in vec((any_packet(), any::<bool>()), 1..100)) {
        let mut driver = Driver::started(Carrier::Pci);
        let mut programs = Vec::new();
        for ((packet, data), calls) in packets {
            if calls {
                let (program, device) = pair();
                let _ = (&program).write(b"something to say");
                if Arc::clone(&driver.incoming).connect(PORT, device, Answers::default()).is_ok() {
                    programs.push(program);
                }
            }
            // Its own check, that the chain comes back, is all that is expected.
            driver.send(packet, &data);
            driver.guest.run();
            driver.heard.clear();
            if driver.guest.status() != RUNNING {
                break;
            }
        }
        driver.restart();
        driver.called();
    }

    #[test]
    fn no_act_stops_the_device(acts in vec(prop_oneof![any_act(3, 128), chain_act(3, 128)], 1..60)) {
        let mut driver = Driver::new(Carrier::Pci);
        for act in acts {
            act.apply(&mut driver.guest);
        }
        driver.restart();
        driver.called();
    }
}
