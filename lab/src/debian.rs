//! A stock Debian on a disk, built of its packages and kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use api::units::Bytes;
use disks::Stop;
use disks::debian::Build;
use sha2::{Digest, Sha256};

use crate::error::files;
use crate::{Error, cache, inside, progress};

/// Where its files lie in an emulated host.
const INSIDE: &str = "/debian";
/// Where the root partition begins in the image, in bytes.
const ROOT: u64 = 1 << 20;

/// A Debian image, with what it boots by.
#[derive(Clone, Debug)]
pub struct DebianImage {
    directory: PathBuf,
}

impl DebianImage {
    /// Debian 12 on a disk of 4 GiB, where this runs; built where it is not in the cache, which takes minutes.
    ///
    /// # Errors
    /// Where it can't be built.
    pub fn bookworm() -> Result<Self, Error> {
        if inside() {
            return Ok(Self { directory: INSIDE.into() });
        }
        let failed = |error: &dyn ToString| Error::Failed(error.to_string());
        let _lock = cache::lock("debian-image")?;
        let mut build = Build {
            release: "bookworm".parse().map_err(|error| failed(&error))?,
            size: Bytes::gib(4),
            mirror: None,
            path: PathBuf::new(),
            force: true,
        };
        let hash: String = Sha256::digest(build.inputs()).iter().map(|byte| format!("{byte:02x}")).collect();
        let directory = cache::directory("images")?.join(hash.get(..16).unwrap_or(&hash));
        let image = Self { directory: directory.clone() };
        if image.root_file().exists() {
            return Ok(image);
        }
        fs::create_dir_all(&directory).map_err(files(directory.display()))?;
        let step = progress::begin("building a Debian image");
        build.path = directory.join("disk.img");
        let built = build.run(&Stop::new(false), |what| step.say(&what.to_string()));
        let built = built.map_err(|error| failed(&error))?;
        let file_system = format!("{}?offset={ROOT}", build.path.display());
        for (link, file) in [("/vmlinuz", image.kernel()), ("/initrd.img", image.initrd())] {
            let name = kernel_file(&file_system, link)?;
            run(Command::new("debugfs").args([
                "-R",
                &format!("dump /{name} {}", file.display()),
                &file_system,
            ]))?;
        }
        let (raw, disk) = (build.path.as_path(), image.disk());
        run(Command::new("qemu-img").args(["convert", "-c", "-f", "raw", "-O", "qcow2"]).args([raw, &disk]))?;
        fs::remove_file(raw).map_err(files(raw.display()))?;
        cache::write_whole(&image.root_file(), built.partition.as_bytes())?;
        Ok(image)
    }

    /// The disk, as a compressed qcow2 image.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.qcow2")
    }

    /// Its kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// Its initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.directory.join("initrd.img")
    }

    fn root_file(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// What its kernel is to take for its root file system.
    ///
    /// # Errors
    /// Where that is not known.
    pub fn root(&self) -> Result<String, Error> {
        let file = self.root_file();
        Ok(format!("PARTUUID={}", fs::read_to_string(&file).map_err(files(file.display()))?))
    }

    /// Its files, and where they lie in an emulated host.
    pub fn placed(&self) -> Vec<(PathBuf, String)> {
        let all = [self.disk(), self.kernel(), self.initrd(), self.root_file()];
        let place = |file: PathBuf| {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned())?;
            Some((file, format!("{INSIDE}/{name}")))
        };
        all.into_iter().filter_map(place).collect()
    }
}

/// The file in /boot that a link in the root directory leads to.
fn kernel_file(file_system: &str, link: &str) -> Result<String, Error> {
    let told = Command::new("debugfs").args(["-R", &format!("stat {link}"), file_system]).output();
    let told = told.map_err(files("debugfs"))?;
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    let target = text.lines().find_map(|line| line.trim().strip_prefix("Fast link dest: "));
    let target = target.map(|target| target.trim_matches('"').to_owned());
    target.ok_or_else(|| Error::Failed(format!("the image has no {link}: {text}")))
}

fn run(command: &mut Command) -> Result<(), Error> {
    let name = Path::new(command.get_program()).display().to_string();
    let output = command.output().map_err(files(&name))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Failed(format!("{name}: {}", String::from_utf8_lossy(&output.stderr))))
}
