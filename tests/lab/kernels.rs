//! The kernels of the lab: Debian's cloud kernels 6.1 and 6.12, each with its modules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use slat::lab::archive::Archive;

use crate::{artifacts, cache, modules, packages};

/// What a guest of the lab may need, in the order wanted where nothing else decides.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_balloon",
    "virtio_mem",
    "virtio_rng",
    "pvpanic-mmio",
    "button",
    "evdev",
];

/// What the agent's port needs beside; built into 6.12.
const AGENT_MODULES: &[&str] = &["virtio_console"];

/// Where the agent lies in a guest.
const AGENT_INSIDE: &str = "/bin/ballast-agent";

/// A kernel that the lab can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Kernel {
    /// Linux 6.1, Debian 12's own; its balloon driver sends 10 statistics.
    #[value(name = "6.1")]
    V6_1,
    /// Linux 6.12, from Debian 12's security updates; its balloon driver sends 16 statistics.
    #[value(name = "6.12")]
    V6_12,
}

/// A guest's files, on this machine or in an emulated host.
#[derive(Clone, Debug)]
pub struct GuestImages {
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// The same kernel as an uncompressed ELF with a PVH note (6.1 only).
    pub elf: Option<PathBuf>,
    /// The lab's init with the kernel's modules.
    pub initrd: PathBuf,
    /// The same with `ballast-agent` and the module of its port.
    pub agent_initrd: PathBuf,
}

impl Kernel {
    /// Its series, as in `uname -r`.
    pub const fn series(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// Statistics that its balloon driver sends.
    pub const fn statistics(self) -> usize {
        match self {
            Self::V6_1 => 10,
            Self::V6_12 => 16,
        }
    }

    /// Where these files lie in an emulated host.
    pub fn images_inside(self) -> GuestImages {
        let directory = Path::new("/guest").join(self.series());
        GuestImages {
            bzimage: directory.join("bzImage"),
            elf: (self == Self::V6_1).then(|| directory.join("vmlinux")),
            initrd: directory.join("initrd"),
            agent_initrd: directory.join("initrd-agent"),
        }
    }

    /// Where these files lie on this machine; fetched and made where missing.
    ///
    /// # Errors
    /// Where fetching or unpacking fails.
    pub fn images(self) -> Result<GuestImages> {
        let elf = match self {
            Self::V6_1 => Some(self.elf()?),
            Self::V6_12 => None,
        };
        Ok(GuestImages {
            bzimage: self.bzimage()?,
            elf,
            initrd: self.initrd(self.series(), GUEST_MODULES, &[])?,
            agent_initrd: self.initrd(
                &format!("{}-agent", self.series()),
                &[GUEST_MODULES, AGENT_MODULES].concat(),
                &[(AGENT_INSIDE, artifacts::agent()?)],
            )?,
        })
    }

    fn root(self) -> Result<PathBuf> {
        let (prefix, suffix) = match self {
            Self::V6_1 => ("linux-image-6.1.0-", "-cloud-amd64"),
            Self::V6_12 => ("linux-image-6.12.", "+deb12-cloud-amd64-unsigned"),
        };
        packages::unpacked(&packages::newest(prefix, suffix)?)
    }

    /// The kernel as Debian ships it.
    pub(crate) fn bzimage(self) -> Result<PathBuf> {
        only_entry(&self.root()?.join("boot"), "vmlinuz-")
    }

    /// Its modules called `names` with what they depend on, in loading order.
    pub(crate) fn modules(self, names: &[&str]) -> Result<Vec<modules::Module>> {
        let modules = self.root()?.join("lib/modules");
        modules::in_order(&only_entry(&modules, self.series())?.join("kernel"), names)
    }

    /// The ELF in a bzImage whose payload is LZ4, once made kept beside the package.
    fn elf(self) -> Result<PathBuf> {
        let path = self.root()?.with_file_name("vmlinux");
        if !path.exists() {
            let image = fs::read(self.bzimage()?)?;
            cache::write_whole(&path, &unpack_lz4(&image)?)?;
        }
        Ok(path)
    }

    fn initrd(self, name: &str, modules: &[&str], files: &[(&str, PathBuf)]) -> Result<PathBuf> {
        let mut archive = Archive::with_program("/init", &fs::read(artifacts::guest_init()?)?)?;
        let mut order = String::new();
        for module in self.modules(modules)? {
            let path = format!("/lib/modules/{}.ko", module.name);
            archive.contents(&path, 0o644, &module.contents)?;
            order.push_str(&path);
            order.push('\n');
        }
        archive.contents("/lib/modules/order", 0o644, order.as_bytes())?;
        for (inside, path) in files {
            archive.file(inside, path)?;
        }
        let path = cache::directory("initrd")?.join(name);
        let bytes = archive.finish()?;
        // Rewritten only where it differs: another test may be reading it.
        if fs::read(&path).ok().as_deref() != Some(&bytes[..]) {
            cache::write_whole(&path, &bytes)?;
        }
        Ok(path)
    }
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(directory)
        .with_context(|| format!("{} can't be read", directory.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("{} has no {prefix}*", directory.display()))
}

/// The kernel in a bzImage: the payload that the setup header names
/// (Documentation/arch/x86/boot.rst), in LZ4's legacy frame, followed by its unpacked size.
fn unpack_lz4(image: &[u8]) -> Result<Vec<u8>> {
    const LEGACY_MAGIC: u32 = 0x184C_2102;
    const LARGEST_BLOCK: usize = 8 << 20;
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the bzImage is cut short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let setup_sectors = usize::from(*image.get(0x1f1).context("the bzImage is cut short")?);
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let end = start + word(0x24c)? - 4;
    ensure!(word(start)? == LEGACY_MAGIC as usize, "the bzImage's payload is not LZ4");
    let mut unpacked = Vec::with_capacity(word(end)?);
    let mut block = vec![0; LARGEST_BLOCK];
    let mut at = start + 4;
    while at < end {
        let packed = image.get(at + 4..at + 4 + word(at)?).context("a block runs past the payload")?;
        let length = lz4_flex::block::decompress_into(packed, &mut block)?;
        unpacked.extend_from_slice(&block[..length]);
        at += 4 + packed.len();
    }
    ensure!(unpacked.len() == word(end)?, "the kernel unpacked to another size than it says");
    ensure!(unpacked.starts_with(b"\x7fELF"), "the payload is no ELF");
    Ok(unpacked)
}
