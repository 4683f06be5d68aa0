//! Message-signalled interrupts of one PCI function, delivered by KVM.
//!
//! An unmasked vector's eventfd is connected with its route, so that an interrupt takes no step of this
//! process. A masked one's is not: what is written to it stays there, and is delivered when it is connected
//! again, as KVM looks at it then.
//!
//! The order is: disconnect, set the table, connect. Hosts with AMD's AVIC before Linux 6.2 can crash where the
//! route of a connected eventfd changes.

use std::io;
use std::sync::Arc;

use devices::pci::{MsiMessage, MsiVectors};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::routing::Routing;

/// The vectors of one function.
pub struct Vectors {
    vm: Arc<VmFd>,
    routing: Arc<Routing>,
    vectors: Vec<Vector>,
}

struct Vector {
    event: EventFd,
    gsi: u32,
    /// The message that it is connected with; `None` is masked.
    delivers: Mutex<Option<MsiMessage>>,
}

impl Vectors {
    /// One vector for each of these interrupt numbers, all masked.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new(vm: Arc<VmFd>, routing: Arc<Routing>, gsis: &[u32]) -> io::Result<Self> {
        let vector = |&gsi: &u32| {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            Ok(Vector { event, gsi, delivers: Mutex::new(None) })
        };
        Ok(Self { vm, routing, vectors: gsis.iter().map(vector).collect::<io::Result<_>>()? })
    }

    fn vector(&self, vector: u16) -> io::Result<&Vector> {
        self.vectors.get(usize::from(vector)).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

impl Vector {
    fn disconnect(&self, vm: &VmFd, delivers: &mut Option<MsiMessage>) -> io::Result<()> {
        if delivers.is_some() {
            vm.unregister_irqfd(&self.event, self.gsi).map_err(host_error)?;
            *delivers = None;
        }
        Ok(())
    }
}

fn host_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl MsiVectors for Vectors {
    fn count(&self) -> u16 {
        // A function has 2048 at most.
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    fn event(&self, vector: u16) -> Option<&EventFd> {
        self.vector(vector).ok().map(|vector| &vector.event)
    }

    fn unmask(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        let vector = self.vector(vector)?;
        let mut delivers = vector.delivers.lock();
        if *delivers == Some(message) {
            return Ok(());
        }
        vector.disconnect(&self.vm, &mut delivers)?;
        self.routing.route(vector.gsi, message).map_err(host_error)?;
        self.vm.register_irqfd(&vector.event, vector.gsi).map_err(host_error)?;
        *delivers = Some(message);
        Ok(())
    }

    fn mask(&self, vector: u16) -> io::Result<()> {
        let vector = self.vector(vector)?;
        vector.disconnect(&self.vm, &mut vector.delivers.lock())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
    use kvm_ioctls::{Kvm, VcpuFd};

    use super::*;

    /// A local APIC that takes interrupts, and what delivers some. The vCPU never runs: what has come stands in
    /// its interrupt request register.
    struct Target {
        vm: Arc<VmFd>,
        vcpu: VcpuFd,
        vectors: Vectors,
    }

    // Offsets in a local APIC (SDM volume 3, table 11-1).
    const SPURIOUS: usize = 0xf0;
    const REQUESTS: usize = 0x200;

    impl Target {
        fn new(kvm: &Kvm) -> Self {
            let vm = Arc::new(kvm.create_vm().expect("a VM"));
            vm.create_irq_chip().expect("interrupt controllers");
            let vcpu = vm.create_vcpu(0).expect("a vCPU");
            let mut apic = vcpu.get_lapic().expect("an APIC");
            apic.regs[SPURIOUS + 1] |= 1;
            vcpu.set_lapic(&apic).expect("it is switched on");
            let routing = Arc::new(Routing::new(vm.clone()));
            let vectors = Vectors::new(vm.clone(), routing, &[24, 25]).expect("two vectors");
            Self { vm, vcpu, vectors }
        }

        fn has(&self, vector: usize) -> bool {
            let apic = self.vcpu.get_lapic().expect("an APIC");
            apic.regs[REQUESTS + vector / 32 * 16 + vector % 32 / 8] as u8 & 1 << (vector % 8) != 0
        }

        /// KVM may deliver on a thread of its own.
        fn gets(&self, vector: usize) -> bool {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(10) {
                if self.has(vector) {
                    return true;
                }
                std::thread::yield_now();
            }
            false
        }

        fn raise(&self, vector: u16) {
            self.vectors.event(vector).expect("it is there").write(1).expect("room");
        }
    }

    fn message(data: u32) -> MsiMessage {
        MsiMessage { address: 0xfee0_0000, data }
    }

    #[test]
    fn what_is_masked_waits_and_what_is_not_comes() {
        let Some(kvm) = crate::kvm::for_tests() else { return };
        let target = Target::new(&kvm);
        target.raise(0);
        target.vectors.unmask(0, message(0x41)).expect("unmasked");
        assert!(target.gets(0x41), "it was raised before");
        target.vectors.unmask(1, message(0x42)).expect("unmasked");
        target.vectors.mask(1).expect("masked");
        target.raise(1);
        target.vectors.unmask(0, message(0x43)).expect("another message");
        target.raise(0);
        assert!(target.gets(0x43));
        assert!(!target.has(0x42));
        target.vectors.unmask(1, message(0x42)).expect("unmasked");
        assert!(target.gets(0x42), "masking loses nothing");
        target.vectors.mask(1).and_then(|()| target.vectors.mask(1)).expect("masked");
        assert!(target.vectors.mask(2).is_err() && target.vectors.event(2).is_none());
    }

    /// The table is set whole: pins must be in it.
    #[test]
    fn a_table_with_messages_leaves_the_pins_alone() {
        let Some(kvm) = crate::kvm::for_tests() else { return };
        let target = Target::new(&kvm);
        target.vectors.unmask(0, message(0x41)).expect("unmasked");
        for (pin, vector) in [(4u32, 0x34), (17, 0x51), (23, 0x57)] {
            let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
            target.vm.get_irqchip(&mut ioapic).expect("an IOAPIC");
            // SAFETY: for this chip KVM has filled in the `ioapic` part of the union, which is plain numbers.
            let state = unsafe { &mut ioapic.chip.ioapic };
            // Edge, fixed, unmasked, to the first vCPU.
            state.redirtbl[pin as usize].bits = vector as u64;
            target.vm.set_irqchip(&ioapic).expect("it is set");
            let line = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
            target.vm.register_irqfd(&line, pin).expect("connected");
            line.write(1).expect("room");
            assert!(target.gets(vector), "pin {pin}");
        }
    }

    #[test]
    fn a_strange_message_leaves_a_vector_as_good_as_before() {
        let Some(kvm) = crate::kvm::for_tests() else { return };
        let target = Target::new(&kvm);
        // Not below 4 GiB: with identifiers of 32 bits these bits must be zero. Without, KVM takes no notice.
        let strange = MsiMessage { address: u64::MAX, data: u32::MAX };
        let _ = target.vectors.unmask(0, strange);
        target.vectors.unmask(0, message(0x41)).expect("unmasked");
        target.raise(0);
        assert!(target.gets(0x41));
    }
}
