//! The kernel's command line: what stands on it by default, what a VM's devices add, and what defeats them.

use std::fmt;

use api::units::Bytes;

use super::{Device, DeviceConfig, Transport, VmConfig};

/// The command line of a guest for which the user gives none. Each word saves something, or makes an end known:
/// * `console=ttyS0`: what the kernel says comes out at the serial port.
/// * `panic=-1`: a panic ends the process at once.
/// * `quiet`: only errors come before the first program, which tell why there is none; each byte at the serial
///   port costs two exits.
/// * `cryptomgr.notests`: the kernel's ciphers are not tested against known answers at each start, which is two
///   thirds of what a stock kernel does until its first program. See [`with_words`] for FIPS.
/// * `swiotlb=noforce`: no 64 MiB are set aside for devices that can't reach memory above 4 GiB: there are none.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 quiet cryptomgr.notests swiotlb=noforce";

/// The word of the default that a guest in FIPS mode must not have: its kernel has to test its ciphers.
const NO_SELF_TESTS: &str = "cryptomgr.notests";
/// What puts a guest into FIPS mode.
const FIPS: &str = "fips=1";

/// A command line with `words` behind it: what they say wins over what stands there. In FIPS mode the kernel tests
/// its ciphers, whatever the default says.
pub fn with_words(cmdline: &str, words: &str) -> String {
    let line = [cmdline, words].join(" ");
    let tests = cmdline == DEFAULT_CMDLINE && line.split_whitespace().any(|word| word == FIPS);
    let kept = line.split_whitespace().filter(|word| !(tests && *word == NO_SELF_TESTS));
    if tests { kept.collect::<Vec<_>>().join(" ") } else { line.trim().to_owned() }
}

/// The user's `cmdline` behind `words` of the guest's disk: what the user says wins. In FIPS mode the kernel tests its
/// ciphers, whatever the default says.
pub fn behind_words(words: &str, cmdline: &str) -> String {
    let is_fips = words.split_whitespace().any(|word| word == FIPS);
    let own = |word: &&str| !(is_fips && *word == NO_SELF_TESTS);
    let is_root = |word: &str| name_of(word) == "root";
    let has_root = cmdline.split_whitespace().any(is_root);
    let kept = words.split_whitespace().filter(|word| !(has_root && is_root(word)));
    kept.chain(cmdline.split_whitespace().filter(own)).collect::<Vec<_>>().join(" ")
}

/// What a guest that plugs needs on its kernel's command line: memory that is used as soon as it is plugged.
const ONLINE: &str = "memhp_default_state=online";

/// Memory that is plugged is kept movable, so that it can be unplugged, as long as the guest has a quarter that is
/// not (Linux 5.16 and later: Documentation/admin-guide/mm/memory-hotplug.rst).
const KEPT_MOVABLE: &str = "memory_hotplug.online_policy=auto-movable";

/// The kernel may use memory that is plugged as programs may. Unplugging gives less back then, and slowly.
const FOR_THE_KERNEL_TOO: &str = "memory_hotplug.online_policy=contig-zones";

/// With less than this at its start a guest's programs fill what its kernel could use before they fill movable memory:
/// it then kills processes for want of a page for its kernel, with much memory free.
const ENOUGH_FOR_THE_KERNEL: Bytes = Bytes::mib(192);

/// Keeps a guest from looking for a PCI bus that is not there, which would be some 300 exits.
const NO_PCI_WORD: &str = "pci=off";

/// Keeps cloud-init from looking for a cloud's services in the network, for which it waits for minutes.
const NO_CLOUD: &str = "ds=nocloud";

/// A word of the user's with which the guest does not work here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hindrance {
    word: String,
    consequence: &'static str,
}

impl fmt::Display for Hindrance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` on the kernel's command line {}", self.word, self.consequence)
    }
}

const NO_CLOCK: &str =
    "takes away kvmclock, the one clock that a guest has here: it will not boot; take the word off";
const NO_TABLES: &str = "hides what the guest has from it, as there is nothing to find it by but ACPI: it will hardly boot, and not \
     power off; take the word off";
const NO_INTERRUPTS: &str = "takes away the guest's interrupts: its devices will not work; take the word off";
const NO_DEVICES: &str =
    "hides all of the guest's devices: take it off the kernel's command line, or use --transport mmio";
const NO_VECTORS: &str = "takes away the interrupts of the guest's devices: take it off the kernel's command line, or use --transport \
     mmio";

const NO_DUMP: &str = "sets memory apart for a kernel that dumps a crashed one, which needs virtio_mem in an initramfs of its own \
     here: without it, reading the dump touches memory that is not plugged, which ends the VM; put virtio_mem into the \
     initramfs that kdump makes, or use --grow balloon";

/// Words that no guest works with here, each with what comes of it.
const HINDRANCES: [(&str, &str); 6] = [
    ("no-kvmclock", NO_CLOCK),
    ("nopv", NO_CLOCK),
    ("acpi=off", NO_TABLES),
    ("noapic", NO_INTERRUPTS),
    ("nolapic", NO_INTERRUPTS),
    ("disableapic", NO_INTERRUPTS),
];

impl VmConfig {
    /// The command line that the guest gets: the user's, and what its devices ask for. A word that the user
    /// gave as well stays as it is.
    pub fn kernel_cmdline(&self) -> String {
        let has_enough = self.limits.startup() >= ENOUGH_FOR_THE_KERNEL;
        let plug: &[&str] = match self.plugs_memory() {
            true if has_enough => &[ONLINE, KEPT_MOVABLE],
            true => &[ONLINE, FOR_THE_KERNEL_TOO],
            false => &[],
        };
        let pci: &[&str] = if self.transport == Transport::Mmio { &[NO_PCI_WORD] } else { &[] };
        let is_seed = |config: &DeviceConfig| matches!(config.device, Device::CloudInit(_));
        let seed: &[&str] = if self.devices.iter().any(is_seed) { &[NO_CLOUD] } else { &[] };
        plug.iter().chain(pci).chain(seed).fold(self.cmdline.clone(), |line, word| {
            let name = name_of(word);
            let given = line.split_whitespace().any(|other| name_of(other) == name);
            if given { line } else { format!("{line} {word}") }
        })
    }

    /// The user's words with which the guest does not work here.
    pub fn hindrances(&self) -> Vec<Hindrance> {
        let hindered = |word: &str| {
            let known =
                HINDRANCES.iter().find(|(known, _)| *known == word).map(|(_, consequence)| *consequence);
            let by_pci = (self.transport == Transport::Pci).then(|| consequence_on_pci(word)).flatten();
            let dumps = self.plugs_memory() && name_of(word) == "crashkernel" && word != "crashkernel=0";
            let consequence = known.or(by_pci).or(dumps.then_some(NO_DUMP))?;
            Some(Hindrance { word: word.to_owned(), consequence })
        };
        self.cmdline.split_whitespace().filter_map(hindered).collect()
    }
}

/// What comes of an option of `pci=`, a list with commas.
fn consequence_on_pci(word: &str) -> Option<&'static str> {
    word.strip_prefix("pci=")?.split(',').find_map(|option| match option {
        "off" => Some(NO_DEVICES),
        "nomsi" => Some(NO_VECTORS),
        _ => None,
    })
}

/// What a word of a command line is about.
fn name_of(word: &str) -> &str {
    word.split_once('=').map_or(word, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use disks::seed::Seed;

    fn config(cmdline: &str) -> VmConfig {
        let mut config =
            crate::config::tests::config(r#"{"id": "balloon", "type": "balloon"}"#).expect("whole");
        config.cmdline = cmdline.to_owned();
        config
    }

    #[test]
    fn what_the_user_says_on_the_command_line_stands() {
        let mut config = config("quiet");
        assert_eq!(config.kernel_cmdline(), "quiet");
        config.transport = Transport::Mmio;
        assert_eq!(config.kernel_cmdline(), "quiet pci=off");
        config.cmdline = "pci=nocrs memhp_default_state=online_movable".to_owned();
        config.devices.push(DeviceConfig::new("memory".parse().unwrap(), Device::Memory));
        assert_eq!(
            config.kernel_cmdline(),
            "pci=nocrs memhp_default_state=online_movable memory_hotplug.online_policy=contig-zones"
        );
        let seed = Seed::new("#!/bin/sh\n", None, None).unwrap();
        config.devices.push(DeviceConfig::new("seed".parse().unwrap(), Device::CloudInit(seed)));
        assert!(config.kernel_cmdline().ends_with(" ds=nocloud"));
        let by_user = VmConfig { cmdline: "ds=nocloud;s=/seed/".to_owned(), ..config.clone() };
        assert_eq!(by_user.kernel_cmdline().matches("ds=").count(), 1);
        config.devices.pop();
        config.limits = "256M,max=1G".parse().unwrap();
        assert_eq!(
            config.kernel_cmdline(),
            "pci=nocrs memhp_default_state=online_movable memory_hotplug.online_policy=auto-movable"
        );
    }

    #[test]
    fn words_are_added_and_the_ciphers_are_tested_in_fips_mode() {
        assert_eq!(with_words(DEFAULT_CMDLINE, ""), DEFAULT_CMDLINE);
        assert_eq!(with_words(DEFAULT_CMDLINE, "root=/dev/vda"), format!("{DEFAULT_CMDLINE} root=/dev/vda"));
        let fips = with_words(DEFAULT_CMDLINE, "root=/dev/vda fips=1");
        assert_eq!(fips, "console=ttyS0 panic=-1 quiet swiotlb=noforce root=/dev/vda fips=1");
        // What the user wrote stays.
        let own = "cryptomgr.notests  fips=1";
        assert_eq!(with_words(own, "x"), format!("{own} x"));
        assert!(with_words(DEFAULT_CMDLINE, "fips=10").contains(NO_SELF_TESTS));
    }

    #[test]
    fn what_a_disk_says_comes_first_and_loses() {
        let line = |words, users| behind_words(words, users);
        assert_eq!(line("root=PARTUUID=1 ro console=tty0", "console=ttyS0"), {
            "root=PARTUUID=1 ro console=tty0 console=ttyS0"
        });
        assert_eq!(line("root=PARTUUID=1 ro x", "quiet root=/dev/vdb1"), "ro x quiet root=/dev/vdb1");
        assert!(line("root=x rootflags=y", DEFAULT_CMDLINE).contains(NO_SELF_TESTS));
        assert!(!line("root=x fips=1", DEFAULT_CMDLINE).contains(NO_SELF_TESTS));
    }

    #[test]
    fn words_that_defeat_the_guest_are_told() {
        let told = |cmdline: &str, transport| {
            let config = VmConfig { transport, ..config(cmdline) };
            config.hindrances().iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let both = [Transport::Pci, Transport::Mmio];
        for transport in both {
            for word in ["nopv", "no-kvmclock", "acpi=off", "noapic", "nolapic"] {
                let told = told(&format!("quiet {word} x=1"), transport);
                assert!(told.len() == 1 && told[0].contains(&format!("`{word}`")), "{told:?}");
            }
            for fine in ["", DEFAULT_CMDLINE, "no-kvmclock-vsyscall pci=noaer nopvspin root=nopv"] {
                assert_eq!(told(fine, transport), [""; 0]);
            }
        }
        let mut plugs = config("quiet crashkernel=256M");
        assert_eq!(plugs.hindrances(), []);
        plugs.devices.push(DeviceConfig::new("memory".parse().unwrap(), Device::Memory));
        let of_dumps = plugs.hindrances().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(of_dumps.len() == 1 && of_dumps[0].contains("virtio_mem"), "{of_dumps:?}");
        plugs.cmdline = "crashkernel=0".to_owned();
        assert_eq!(plugs.hindrances(), []);
        for word in ["pci=off", "pci=noaer,nomsi"] {
            assert_eq!(both.map(|transport| told(word, transport).len()), [1, 0], "{word}");
        }
    }
}
