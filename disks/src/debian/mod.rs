//! A bootable Debian image, built of the distribution's own packages.
//!
//! The layout is that of Debian's genericcloud images: a GPT whose partition 1 is the root file system, an ext4 with
//! /boot in it. Partitions 14 (GRUB's core) and 15 (EFI) are left out, as ballast reads the kernel out of the root
//! file system. What the guest has is what genericcloud has: systemd, cloud-init, the OpenSSH server, netplan with
//! systemd-networkd, the cloud kernel with its initramfs.
//!
//! The same packages give the same bytes: all identifiers come from a hash of what is installed, and all times
//! from the packages.

mod identity;
mod layout;
mod work;

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use api::units::Bytes;

use self::identity::Identity;
use self::work::Work;
use crate::tool::{self, Stop, Tool, ToolError};

/// What is installed beside the packages that Debian calls required, and apt.
pub const PACKAGES: &[&str] = &[
    "ca-certificates",
    "cloud-guest-utils",
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "fdisk",
    "ifupdown-",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "netbase",
    "netplan.io",
    "openssh-client",
    "openssh-server",
    "procps",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
    "zstd",
];

/// The time that programs are told which put it into what they make. Packages' files keep their own.
const BUILD_TIME: &str = "1686355200";

/// The smallest disk on which the packages have room, and the guest some to work with.
pub const LEAST_SIZE: Bytes = Bytes::gib(2);
/// The largest: more makes no sense for a file system that grows with its disk.
pub const MOST_SIZE: Bytes = Bytes::gib(16 << 10);

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A release of Debian, by its code name, such as `bookworm`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release(String);

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Release {
    type Err = BuildError;

    fn from_str(text: &str) -> Result<Self, BuildError> {
        let is_name = (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase());
        if is_name { Ok(Self(text.to_owned())) } else { Err(BuildError::Release(text.to_owned())) }
    }
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// No code name.
    #[error("`{0}` is no release of Debian: give its code name, such as bookworm")]
    Release(String),
    /// Too small or too large.
    #[error("an image of {0} can't be built: give it {LEAST_SIZE} to {MOST_SIZE}")]
    Size(Bytes),
    /// The name is taken.
    #[error("{} is there already: choose another name, or say --force to replace it", .0.display())]
    Exists(PathBuf),
    /// The keys that Debian signs its packages with.
    #[error("Debian's keys are missing here ({KEYRING}): apt-get install debian-archive-keyring")]
    NoKeyring,
    /// A step on this host.
    #[error("{what}: {source}")]
    Host {
        /// What was tried, with the file.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The table of partitions.
    #[error("the table of partitions can't be written: {0}")]
    Table(String),
}

/// `map_err` with what was tried.
fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> BuildError {
    let what = what.into();
    move |source| BuildError::Host { what, source }
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Build {
    /// The release.
    pub release: Release,
    /// Bytes of the disk.
    pub size: Bytes,
    /// Where packages come from; `None` is Debian's own mirror network.
    pub mirror: Option<String>,
    /// The image. Its name says what it is: qcow2 where it ends so, raw otherwise.
    pub path: PathBuf,
    /// An image of that name may be replaced.
    pub force: bool,
}

/// An image that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// Installed packages.
    pub packages: usize,
    /// The root file system's UUID.
    pub root: String,
    /// The root partition's.
    pub partition: String,
}

/// What is being done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Packages are fetched and installed; what mmdebstrap says of it.
    Packages(String),
    /// The file system is made.
    FileSystem,
    /// The image is written.
    Image,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packages(said) => f.write_str(said),
            Self::FileSystem => f.write_str("making the file system"),
            Self::Image => f.write_str("writing the image"),
        }
    }
}

impl Build {
    fn is_qcow2(&self) -> bool {
        self.path.extension().is_some_and(|end| end.eq_ignore_ascii_case("qcow2"))
    }

    /// What the image is made of, as text: the same text gives the same image as long as the archive has the same
    /// packages.
    pub fn inputs(&self) -> String {
        let Self { release, size, mirror, .. } = self;
        let mirror = mirror.as_deref().unwrap_or_default();
        let kind = if self.is_qcow2() { "qcow2" } else { "raw" };
        let made_here = [work::FINISH, crate::WAKE_RULE_PATH, crate::WAKE_RULE].join(" ");
        format!("{release} {} {mirror} {kind} {} {made_here}", size.0, PACKAGES.join(" "))
    }

    /// Looks at what can be known before the work begins.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn check(&self) -> Result<(), BuildError> {
        if !(LEAST_SIZE..=MOST_SIZE).contains(&self.size) {
            return Err(BuildError::Size(self.size));
        }
        if !self.force && self.path.symlink_metadata().is_ok() {
            return Err(BuildError::Exists(self.path.clone()));
        }
        let mut tools = vec![
            Tool { program: "mmdebstrap", package: "mmdebstrap" },
            Tool { program: "mke2fs", package: "e2fsprogs" },
            Tool { program: "unshare", package: "util-linux" },
        ];
        if self.is_qcow2() {
            tools.push(Tool { program: "qemu-img", package: "qemu-utils" });
        }
        if !work::is_root() {
            tools.push(Tool { program: "newuidmap", package: "uidmap" });
        }
        tool::look_for(&tools)?;
        if Path::new(KEYRING).exists() { Ok(()) } else { Err(BuildError::NoKeyring) }
    }

    /// Builds it. Takes minutes, some 200 MB from the mirror, and about 2 GB of the directory for temporary files
    /// (`TMPDIR`). The image is there whole, or not at all.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn run(&self, stop: &Stop, mut step: impl FnMut(Step)) -> Result<Built, BuildError> {
        self.check()?;
        // The place of the image first: if it can't be written, nobody has waited for it.
        let directory = match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let name = self.path.file_name().unwrap_or(OsStr::new("image")).to_string_lossy();
        let target = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(directory)
            .map_err(host(format!("{} can't be written", directory.display())))?;
        let work = Work::new()?;
        tool::run(self.mmdebstrap(&work), stop, |line| {
            if let Some(said) = line.strip_prefix("I: ") {
                step(Step::Packages(said.trim_end_matches('.').to_owned()));
            }
        })?;
        let identity = Identity::of(&work.root(), self.size)?;
        step(Step::FileSystem);
        let raw = work.image();
        layout::make_room(&raw, self.size)?;
        tool::run(work.finish(&identity, layout::root_size(self.size)), stop, |_| {})?;
        step(Step::Image);
        layout::write_table(&raw, &identity)?;
        if self.is_qcow2() {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", "qcow2", "-o", "compat=1.1,lazy_refcounts=off"]);
            tool::run(arguments(convert, [raw.as_os_str(), target.path().as_os_str()]), stop, |_| {})?;
        } else {
            layout::copy_sparse(&raw, target.as_file(), stop)?;
        }
        target.as_file().sync_all().map_err(host(format!("{} can't be written", self.path.display())))?;
        if self.force {
            target.persist(&self.path).map_err(|error| error.error)
        } else {
            target.persist_noclobber(&self.path).map_err(|error| error.error)
        }
        .map_err(host(format!("{} can't be put in its place", self.path.display())))?;
        // The name, too, is to last.
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
        Ok(Built {
            packages: identity.packages,
            root: identity.root.to_string(),
            partition: identity.partition.to_string(),
        })
    }

    fn mmdebstrap(&self, work: &Work) -> Command {
        let mut command = work.in_own_mounts("mmdebstrap");
        command.arg(format!("--mode={}", if work::is_root() { "root" } else { "unshare" }));
        command.args([
            "--format=directory",
            "--variant=minbase",
            "--architectures=amd64",
            "--components=main",
        ]);
        command.arg(format!("--include={}", PACKAGES.join(",")));
        command.args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Retries \"3\""]);
        command.arg(self.release.to_string()).arg(work.root());
        command.args(&self.mirror);
        let epoch = env::var("SOURCE_DATE_EPOCH");
        command.env("SOURCE_DATE_EPOCH", epoch.as_deref().unwrap_or(BUILD_TIME));
        command
    }
}

fn arguments<'a>(mut command: Command, more: impl IntoIterator<Item = &'a OsStr>) -> Command {
    command.args(more);
    command
}

/// Gives a file that a program of another user is to write to everybody.
fn open_to_all(path: &Path, mode: u32) -> Result<(), BuildError> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(host(format!("{} can't be opened to others", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(path: &str) -> Build {
        let release = "bookworm".parse().expect("a release");
        Build { release, size: Bytes::gib(4), mirror: None, path: path.into(), force: false }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_fetched() {
        for wrong in ["", "book worm", "--simulate", "../x", "Bookworm"] {
            assert!(wrong.parse::<Release>().is_err(), "{wrong}");
        }
        for size in [Bytes::mib(1), Bytes(u64::MAX)] {
            let error = Build { size, ..build("x.img") }.check().expect_err("no size").to_string();
            assert!(error.contains("2 GiB to 16 TiB"), "{error}");
        }
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("there.img");
        fs::write(&path, "mine").expect("written");
        let path = path.to_str().expect("text");
        let error = build(path).run(&Stop::new(false), |_| {}).expect_err("it is there").to_string();
        assert!(error.contains("--force"), "{error}");
        assert_eq!(fs::read(path).expect("kept"), b"mine");
        let nowhere = build("/no/such/directory/x.img");
        if nowhere.check().is_ok() {
            let error = nowhere.run(&Stop::new(false), |_| {}).expect_err("no directory").to_string();
            assert!(error.contains("/no/such/directory"), "{error}");
        }
    }

    #[test]
    fn other_inputs_are_another_image() {
        let inputs = build("a.img").inputs();
        assert_eq!(inputs, build("b.raw").inputs());
        assert_ne!(inputs, build("a.qcow2").inputs());
        assert_ne!(inputs, Build { size: Bytes::gib(5), ..build("a.img") }.inputs());
    }
}
