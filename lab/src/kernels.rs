//! The kernels of the lab: Debian's cloud kernels 6.1 and 6.12 and its usual 6.1, each with its modules.

use std::fs;
use std::path::{Path, PathBuf};

use image::kernel::header::SetupHeader;
use lab_init::modules::LIST;

use crate::archive::Archive;
use crate::error::files;
use crate::{Error, InstalledKernel, Vendor, artifacts, cache, inside, packages, progress};

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

/// What the agent's port (built into 6.12) and disks need beside.
const AGENT_MODULES: &[&str] = &["virtio_console", "virtio_blk"];

/// What networks, sockets and shared directories need beside.
const NET_MODULES: &[&str] = &["virtio_net", "vmw_vsock_virtio_transport", "virtiofs"];

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
    /// Linux 6.1 for any machine, packed with xz where the cloud kernels are not.
    #[value(name = "6.1-generic")]
    V6_1Generic,
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
    /// The same with `ballast-agent`, the module of its port, and that of disks.
    pub agent_initrd: PathBuf,
}

impl GuestImages {
    /// These files, and where they lie as others.
    pub(crate) fn placed_as(self, inside: &Self) -> impl Iterator<Item = (PathBuf, String)> + use<> {
        let elf = self.elf.zip(inside.elf.clone());
        let pairs = [
            (self.bzimage, inside.bzimage.clone()),
            (self.initrd, inside.initrd.clone()),
            (self.agent_initrd, inside.agent_initrd.clone()),
        ];
        pairs.into_iter().chain(elf).map(|(here, path)| (here, path.to_string_lossy().into_owned()))
    }
}

impl Kernel {
    /// Its series, as in `uname -r`.
    pub const fn series(self) -> &'static str {
        match self {
            Self::V6_1 | Self::V6_1Generic => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// What its files are called.
    const fn name(self) -> &'static str {
        match self {
            Self::V6_1 | Self::V6_12 => self.series(),
            Self::V6_1Generic => "6.1-generic",
        }
    }

    /// Statistics that its balloon driver sends.
    pub const fn statistics(self) -> usize {
        match self {
            Self::V6_1 | Self::V6_1Generic => 10,
            Self::V6_12 => 16,
        }
    }

    /// Where these files lie in an emulated host.
    pub(crate) fn images_inside(self) -> GuestImages {
        let directory = Path::new("/guest").join(self.name());
        GuestImages {
            bzimage: directory.join("bzImage"),
            elf: (self == Self::V6_1).then(|| directory.join("vmlinux")),
            initrd: directory.join("initrd"),
            agent_initrd: directory.join("initrd-agent"),
        }
    }

    /// The images to boot on the host where this runs: in an emulated host those that were put
    /// there, elsewhere those in the cache, fetched and made where missing.
    ///
    /// # Errors
    /// Where fetching or unpacking fails.
    pub fn guest_images(self) -> Result<GuestImages, Error> {
        if inside() { Ok(self.images_inside()) } else { self.images() }
    }

    /// Where these files lie on this machine.
    pub(crate) fn images(self) -> Result<GuestImages, Error> {
        let elf = match self {
            Self::V6_1 => Some(self.elf()?),
            Self::V6_12 | Self::V6_1Generic => None,
        };
        Ok(GuestImages {
            bzimage: self.installed()?.image,
            elf,
            initrd: self.initrd(self.name(), GUEST_MODULES, &[], false)?,
            agent_initrd: self.initrd(
                &format!("{}-agent", self.name()),
                &[GUEST_MODULES, AGENT_MODULES].concat(),
                &[(AGENT_INSIDE, artifacts::agent()?)],
                false,
            )?,
        })
    }

    /// Where [`Kernel::net_initrd`] lies in an emulated host.
    pub fn net_initrd_inside(self) -> PathBuf {
        self.images_inside().initrd.with_file_name("initrd-net")
    }

    /// The initramfs of a guest with networks, on the host where this runs: as [`GuestImages::agent_initrd`],
    /// with the module of networks, and busybox with its commands. Only few want it.
    ///
    /// # Errors
    /// As [`Kernel::guest_images`].
    pub fn net_initrd(self) -> Result<PathBuf, Error> {
        if inside() {
            return Ok(self.net_initrd_inside());
        }
        self.initrd(
            &format!("{}-net", self.name()),
            &[GUEST_MODULES, AGENT_MODULES, NET_MODULES].concat(),
            &[(AGENT_INSIDE, artifacts::agent()?)],
            true,
        )
    }

    fn root(self) -> Result<PathBuf, Error> {
        let (prefix, suffix) = match self {
            Self::V6_1 => ("linux-image-6.1.0-", "-cloud-amd64"),
            Self::V6_12 => ("linux-image-6.12.", "+deb12-cloud-amd64-unsigned"),
            Self::V6_1Generic => ("linux-image-6.1.0-", "-amd64"),
        };
        packages::unpacked(&packages::newest(prefix, suffix)?)
    }

    /// The kernel as Debian ships it, in the cache.
    ///
    /// # Errors
    /// Where it can't be fetched or unpacked.
    pub fn installed(self) -> Result<InstalledKernel, Error> {
        InstalledKernel::find(&self.root()?, Vendor::Amd)
    }

    /// The ELF in a bzImage, once made kept beside the package.
    fn elf(self) -> Result<PathBuf, Error> {
        let path = self.root()?.with_file_name("vmlinux");
        if !path.exists() {
            let image = self.installed()?.image;
            let _step = progress::begin(format!("unpacking the kernel {}", self.series()));
            let packed = fs::read(&image).map_err(files(image.display()))?;
            let unpacked =
                SetupHeader::parse(&packed).and_then(|header| image::kernel::unpack(&packed, &header));
            let unpacked = unpacked.map_err(|why| Error::Failed(format!("{}: {why}", image.display())))?;
            if !unpacked.starts_with(b"\x7fELF") {
                return Err(Error::Failed(format!("{}: its payload is no ELF", image.display())));
            }
            cache::write_whole(&path, &unpacked)?;
        }
        Ok(path)
    }

    fn initrd(
        self,
        name: &str,
        modules: &[&str],
        more: &[(&str, PathBuf)],
        shell: bool,
    ) -> Result<PathBuf, Error> {
        let modules = self.installed()?.modules(modules)?;
        let paths = modules.iter().map(|module| format!("/lib/modules/{}.ko", module.name));
        let paths: Vec<String> = paths.collect();
        let init = artifacts::guest_init()?;
        let busybox = shell.then(|| packages::unpacked("busybox-static")).transpose()?;
        let build = || {
            let mut archive = Archive::with_program("/init", &fs::read(&init)?)?;
            for (path, module) in paths.iter().zip(&modules) {
                archive.contents(path, 0o644, &module.contents)?;
            }
            archive.contents(LIST, 0o644, paths.join("\n").as_bytes())?;
            for (inside, path) in more {
                archive.file(inside, path)?;
            }
            if let Some(root) = &busybox {
                archive.busybox(&root.join("bin/busybox"))?;
            }
            archive.finish()
        };
        let bytes = build().map_err(files("a guest's initramfs"))?;
        let path = cache::directory("initrd")?.join(name);
        // Rewritten only where it differs: another test may be reading it.
        if fs::read(&path).ok().as_deref() != Some(&bytes[..]) {
            cache::write_whole(&path, &bytes)?;
        }
        Ok(path)
    }
}
