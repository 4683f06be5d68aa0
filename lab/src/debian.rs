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

/// Where it lies in an emulated host.
const INSIDE: &str = "/debian";

/// A Debian image.
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
        if image.disk().exists() {
            return Ok(image);
        }
        fs::create_dir_all(&directory).map_err(files(directory.display()))?;
        let step = progress::begin("building a Debian image");
        build.path = directory.join("disk.img");
        build.run(&Stop::new(false), |what| step.say(&what.to_string())).map_err(|error| failed(&error))?;
        let (raw, packed) = (build.path.as_path(), directory.join("partial"));
        run(Command::new("qemu-img")
            .args(["convert", "-c", "-f", "raw", "-O", "qcow2"])
            .args([raw, &packed]))?;
        fs::rename(&packed, image.disk()).map_err(files(packed.display()))?;
        fs::remove_file(raw).map_err(files(raw.display()))?;
        Ok(image)
    }

    /// The disk, as a compressed qcow2 image.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.qcow2")
    }

    /// It, and where it lies in an emulated host.
    pub fn placed(&self) -> Vec<(PathBuf, String)> {
        vec![(self.disk(), format!("{INSIDE}/disk.qcow2"))]
    }
}

fn run(command: &mut Command) -> Result<(), Error> {
    let name = Path::new(command.get_program()).display().to_string();
    let output = command.output().map_err(files(&name))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Failed(format!("{name}: {}", String::from_utf8_lossy(&output.stderr))))
}
