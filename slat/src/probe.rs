//! What this host has, what is switched on, and how it behaves.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::host::{self, Fact};
use crate::payload::machine::{Failure, Machine};
use crate::payload::{Payload, Setup};

/// Reloads of CR3 in the probe.
const OPERATIONS: u64 = 500;
const LIMIT: Duration = Duration::from_secs(20);

/// How this host gives a guest its memory and runs its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The processor walks two dimensions of tables.
    Slat,
    /// The hypervisor keeps shadow tables; the processor sees those.
    ShadowPaging,
    /// Ring 0 of a guest is emulated instruction by instruction.
    EmulatedRing0,
    /// No guest could be run.
    Unknown,
}

impl Verdict {
    /// In words.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::Slat => "SLAT: a guest reloads CR3 without leaving; the processor walks both dimensions.",
            Self::ShadowPaging => "Shadow paging: the guest leaves at each reload of CR3.",
            Self::EmulatedRing0 => {
                "Ring 0 of a guest is emulated in software: its times mean nothing here, and \
                 nothing can be said of SLAT on this host. Ring 3 runs on the processor, over shadow tables."
            }
            Self::Unknown => "Unknown: no guest could be run here.",
        }
    }
}

/// How the probe's guest behaved.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Behaviour {
    /// `mov cr3` instructions run.
    pub operations: u64,
    /// Exits for each.
    pub exits: f64,
    /// Instructions that KVM emulated for each; `None` where KVM does not count them.
    pub emulated: Option<f64>,
}

impl Behaviour {
    /// What such a host is.
    pub fn verdict(self) -> Verdict {
        if self.emulated.is_some_and(|n| n > 1.5) {
            return Verdict::EmulatedRing0;
        }
        // Hosts that emulate a little (a slow path, an odd exit) are still far from one an operation.
        if self.exits > 0.5 { Verdict::ShadowPaging } else { Verdict::Slat }
    }
}

/// All that was learned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The sentence's short form.
    pub verdict: Verdict,
    /// The KVM module that is loaded.
    pub module: Option<String>,
    /// Its parameters and those of `kvm`.
    pub parameters: BTreeMap<String, String>,
    /// Whether the module says that SLAT is on.
    pub says_slat: Option<bool>,
    /// CPUID and /proc/cpuinfo.
    pub facts: Vec<Fact>,
    /// The guest's behaviour; nothing where none could be run.
    pub behaviour: Option<Behaviour>,
    /// Why no guest could be run.
    pub why: Option<String>,
    /// Where what the host says and what it does disagree.
    pub disagreement: Option<String>,
    /// Whether this host is itself emulated, so that no time means anything.
    pub emulated_host: bool,
}

/// Opens /dev/kvm, or says what to do.
///
/// # Errors
/// A sentence for the user.
pub fn open_kvm() -> Result<Kvm, String> {
    Kvm::new().map_err(why_closed)
}

fn why_closed(error: kvm_ioctls::Error) -> String {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            "there is no /dev/kvm: load kvm_intel or kvm_amd, or switch virtualisation on in the firmware \
             (under another hypervisor: nested virtualisation)"
                .into()
        }
        libc::EACCES | libc::EPERM => {
            "no permission to open /dev/kvm: join the group `kvm`, or run as root".into()
        }
        _ => format!("/dev/kvm cannot be opened: {error}"),
    }
}

fn behave(kvm: &Kvm) -> Result<Behaviour, Failure> {
    let setup = Setup { operations: OPERATIONS, ..Setup::usual(Payload::Cr3Reload) };
    let go_on = AtomicBool::new(false);
    let rounds = Machine::new(kvm, &setup)?.run(1, LIMIT, &go_on)?;
    let counts = rounds.first().map(|r| &r.vcpus).ok_or(Failure::Thread)?;
    let each = |n: u64| n as f64 / OPERATIONS as f64;
    let exits = counts.exits().ok_or_else(|| Failure::Unexpected("KVM counts no exits".into()))?;
    Ok(Behaviour {
        operations: OPERATIONS,
        exits: each(exits),
        emulated: counts.get("insn_emulation").map(each),
    })
}

/// What the words of a host and its deeds say together; a sentence where they disagree.
fn disagreement(says: Option<bool>, verdict: Verdict) -> Option<String> {
    match (says?, verdict) {
        (true, Verdict::ShadowPaging) => Some(
            "The module says that SLAT is on, but the guest leaves at each reload of CR3: \
             believe the guest."
                .into(),
        ),
        (false, Verdict::Slat) => Some(
            "The module says that SLAT is off, but the guest never leaves: believe the guest. \
             Perhaps another hypervisor below does the shadowing."
                .into(),
        ),
        (_, Verdict::EmulatedRing0) => Some(
            "The module has a parameter for SLAT, but ring 0 is emulated: the parameter is not about \
             this."
                .into(),
        ),
        _ => None,
    }
}

/// Asks the host in every way there is.
pub fn probe() -> Probe {
    let parameters = host::module_parameters();
    let says_slat = host::slat_by_module(&parameters);
    let result = open_kvm().and_then(|kvm| behave(&kvm).map_err(|e| e.to_string()));
    let (behaviour, why) = match result {
        Ok(behaviour) => (Some(behaviour), None),
        Err(why) => (None, Some(why)),
    };
    let verdict = behaviour.map_or(Verdict::Unknown, Behaviour::verdict);
    Probe {
        verdict,
        module: host::kvm_module(),
        says_slat,
        parameters,
        facts: host::facts(),
        behaviour,
        why,
        disagreement: disagreement(says_slat, verdict),
        emulated_host: host::is_emulated(),
    }
}

impl Probe {
    /// For the terminal.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.verdict.sentence());
        let mut add = |line: String| text += &(line + "\n");
        if let Some(b) = self.behaviour {
            let emulated = b.emulated.map_or("uncounted".into(), |n| format!("{n:.3}"));
            add(format!(
                "  behaviour      {} x mov cr3: {:.3} exits and {emulated} emulated instructions each",
                b.operations, b.exits
            ));
        }
        if let Some(why) = &self.why {
            add(format!("  no behaviour   {why}"));
        }
        let says = match self.says_slat {
            Some(true) => "SLAT on",
            Some(false) => "SLAT off",
            None => "nothing about SLAT",
        };
        add(format!("  module         {} says {says}", self.module.as_deref().unwrap_or("none loaded")));
        if let Some(sentence) = &self.disagreement {
            add(format!("  disagreement   {sentence}"));
        }
        if self.emulated_host {
            add("  emulated host  Every time measured here is a direction only.".into());
        }
        for (name, value) in &self.parameters {
            let note =
                if name == "kvm.tdp_mmu" { "  (says nothing about SLAT: Y with npt=0 too)" } else { "" };
            add(format!("  {name:<28} {value}{note}"));
        }
        for fact in &self.facts {
            add(format!("  {:<28} {}  ({})", fact.name, fact.value, fact.source));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaviour_tells_the_three_kinds_apart() {
        let host = |exits, emulated| Behaviour { operations: 500, exits, emulated }.verdict();
        assert_eq!(host(0.0, Some(0.0)), Verdict::Slat);
        assert_eq!(host(0.01, None), Verdict::Slat);
        assert_eq!(host(1.0, Some(0.0)), Verdict::ShadowPaging);
        // Emulated SVM without saved next RIP: KVM emulates the mov cr3 itself.
        assert_eq!(host(1.0, Some(1.0)), Verdict::ShadowPaging);
        assert_eq!(host(0.02, Some(8.5)), Verdict::EmulatedRing0);
    }

    #[test]
    fn a_closed_door_has_a_sentence() {
        for (errno, word) in [
            (libc::ENOENT, "there is no /dev/kvm"),
            (libc::EACCES, "group `kvm`"),
            (libc::EIO, "cannot be opened"),
        ] {
            let why = why_closed(kvm_ioctls::Error::new(errno));
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn words_against_deeds() {
        assert_eq!(disagreement(Some(true), Verdict::Slat), None);
        assert_eq!(disagreement(None, Verdict::EmulatedRing0), None);
        assert!(disagreement(Some(true), Verdict::ShadowPaging).is_some());
        assert!(disagreement(Some(false), Verdict::Slat).is_some());
    }

    #[test]
    fn this_host_gets_a_verdict_or_a_reason() {
        let probe = probe();
        println!("{}", probe.text());
        assert_eq!(probe.behaviour.is_none(), probe.why.is_some());
        assert_eq!(probe.verdict == Verdict::Unknown, probe.behaviour.is_none());
    }
}
