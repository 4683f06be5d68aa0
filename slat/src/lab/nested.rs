//! SLAT on and off in real time: in VMs of this host that are hosts themselves.
//!
//! The outer host's own SLAT stays on throughout; what changes is whether the nested host's KVM uses what
//! it is given. A nested host pays for its exits twice, so that its times are upper bounds of the difference
//! on a host of its own.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lab::{InstalledKernel, Vendor};

use super::Error;
use super::findings::Pair;
use super::host::{Errand, Host, Paging};
use crate::probe::{Probe, Verdict};

/// A host that can nest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nested {
    /// Whose virtualisation it passes on.
    vendor: Vendor,
}

impl Nested {
    /// Whether this host can.
    ///
    /// # Errors
    /// A sentence that says what is in the way, and what to do.
    pub fn find(probe: &Probe) -> Result<Self, String> {
        if probe.emulated_host {
            return Err(
                "this host is emulated: times in a nested host would mean nothing; use `ballast slat lab` \
                        without --nested"
                    .into(),
            );
        }
        match probe.verdict {
            Verdict::Slat => {}
            Verdict::Unknown => return Err(probe.why.clone().unwrap_or_default()),
            Verdict::ShadowPaging => {
                return Err(
                    "SLAT is off on this host, and a nested host would have none: switch it on first \
                            (kvm_intel ept=1, kvm_amd npt=1)"
                        .into(),
                );
            }
            Verdict::EmulatedRing0 => {
                return Err(
                    "ring 0 of a guest is emulated in software here, so that a guest can't be a host: use \
                            `ballast slat lab` without --nested, or another machine"
                        .into(),
                );
            }
        }
        let module = probe.module.as_deref().unwrap_or("none");
        let vendor = Vendor::of_module(module)
            .ok_or_else(|| format!("the KVM module here ({module}) is not known to nest"))?;
        match probe.parameters.get(&format!("{module}.nested")).map(String::as_str) {
            Some("Y" | "1") => Ok(Self { vendor }),
            _ => Err(format!(
                "nested virtualisation is off: load the module with `modprobe {module} nested=1` (no VM may be running)"
            )),
        }
    }

    /// Measures with SLAT on, then off, in hosts with a kernel below `kernel_root`.
    ///
    /// # Errors
    /// Where there is no kernel, a host gives nothing, or the user stops it.
    pub fn run(
        self,
        kernel_root: &Path,
        limit: Duration,
        stop: &AtomicBool,
        progress: impl Fn(&str),
    ) -> Result<Pair, Error> {
        let kernel = InstalledKernel::find(kernel_root, self.vendor).map_err(Error::Host)?;
        let one = |paging| {
            let host = Host { vendor: self.vendor, paging, errand: Errand::Time, limit };
            progress(&format!("nested host, {}", host.describe()));
            host.run(&kernel, || stop.load(Ordering::SeqCst))
        };
        Ok(Pair { on: one(Paging::Nested)?, off: one(Paging::Shadow)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(verdict: Verdict, module: &str, nested: &str) -> Probe {
        Probe {
            verdict,
            module: Some(module.into()),
            parameters: [(format!("{module}.nested"), nested.to_owned())].into(),
            says_slat: Some(true),
            facts: Vec::new(),
            behaviour: None,
            why: Some("there is no /dev/kvm".into()),
            disagreement: None,
            emulated_host: false,
        }
    }

    #[test]
    fn only_a_real_host_with_slat_and_nesting_nests() {
        let find = |verdict, module, nested| Nested::find(&host(verdict, module, nested));
        assert_eq!(find(Verdict::Slat, "kvm_intel", "Y"), Ok(Nested { vendor: Vendor::Intel }));
        assert_eq!(find(Verdict::Slat, "kvm_amd", "1"), Ok(Nested { vendor: Vendor::Amd }));
        for (verdict, module, nested, word) in [
            (Verdict::Slat, "kvm_amd", "0", "nested=1"),
            (Verdict::Slat, "kvm_pvm", "Y", "kvm_pvm"),
            (Verdict::ShadowPaging, "kvm_amd", "1", "npt=1"),
            (Verdict::EmulatedRing0, "kvm_pvm", "1", "emulated in software"),
            (Verdict::Unknown, "kvm_amd", "1", "/dev/kvm"),
        ] {
            let why = find(verdict, module, nested).expect_err("it can't");
            assert!(why.contains(word), "{why}");
        }
        let emulated = Probe { emulated_host: true, ..host(Verdict::Slat, "kvm_amd", "1") };
        assert!(Nested::find(&emulated).is_err());
    }
}
