//! `ballast slat all`: everything that a real host can tell, in one file to send on.

use std::path::PathBuf;

use slat::probe::{self, Probe, Verdict};

use super::{ReportArgs, RunArgs, Set, measure, reload, tell, writable};
use crate::failure::Failure;
use crate::sentence;

/// Measure all that a real host can tell of SLAT, into one file that can be sent on and compared
#[derive(clap::Args)]
#[command(after_help = "\
The file holds the processor's name, memory, kernel release, KVM's parameters and figures: no name of the host or
of a user, no address, no path. Set it beside others with `ballast slat compare`.

Examples:
  ballast slat all                                # SLAT as it is here, in slat-host.json; half an hour
  sudo ballast slat all --reload-module           # on and off: slat-host.slat-on.json and slat-host.slat-off.json
  ballast slat compare slat-host.json other.json third.json
")]
pub struct Args {
    /// Where the result goes
    #[arg(long, default_value = "slat-host.json")]
    output: PathBuf,
    /// How often each setup gets a new machine; setups take turns
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    passes: u8,
    /// Measure a second time with SLAT the other way round, by reloading KVM's module (root, no VM running)
    #[arg(long)]
    reload_module: bool,
}

/// Why nothing that is measured on such a host would settle anything.
fn refusal(probe: &Probe) -> Option<String> {
    if probe.emulated_host {
        return Some(
            "this host is emulated, so that its times mean nothing; its counts come from `ballast slat lab`"
                .into(),
        );
    }
    match probe.verdict {
        Verdict::Slat | Verdict::ShadowPaging => None,
        Verdict::EmulatedRing0 => Some(
            "ring 0 of a guest is emulated in software here, so that nothing can be told of SLAT: take a host with \
             kvm_intel or kvm_amd"
                .into(),
        ),
        Verdict::Unknown => Some(probe.why.clone().unwrap_or_else(|| "no guest could be run here".into())),
    }
}

/// Measures everything, or says why not.
pub fn run(args: &Args) -> Result<(), Failure> {
    writable(Some(&args.output))?;
    if let Some(why) = refusal(&probe::probe()) {
        return Err(Failure::host_cannot(why));
    }
    let run = RunArgs {
        passes: args.passes,
        reload_module: args.reload_module,
        output: Some(args.output.clone()),
        ..RunArgs::of(Set::Full)
    };
    if args.reload_module {
        return reload::run(&run);
    }
    measure(&run)?;
    sentence::say(format!("all of it is in {}; what it says of the claims:", args.output.display()));
    tell(&ReportArgs { files: vec![args.output.clone()], html: None, svg: None, json: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_real_host_settles_anything() {
        let host = |verdict, emulated_host| Probe {
            verdict,
            module: None,
            parameters: Default::default(),
            says_slat: None,
            facts: Vec::new(),
            behaviour: None,
            why: Some("there is no /dev/kvm".into()),
            disagreement: None,
            emulated_host,
        };
        assert_eq!(refusal(&host(Verdict::Slat, false)), None);
        assert_eq!(refusal(&host(Verdict::ShadowPaging, false)), None);
        for (verdict, emulated, word) in [
            (Verdict::Slat, true, "emulated"),
            (Verdict::EmulatedRing0, false, "kvm_intel or kvm_amd"),
            (Verdict::Unknown, false, "/dev/kvm"),
        ] {
            assert!(refusal(&host(verdict, emulated)).is_some_and(|why| why.contains(word)), "{word}");
        }
    }
}
