//! Debian packages: fetched without root, installed nowhere, verified by hash at every use.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::error::files;
use crate::installed::numbers;
use crate::{Error, cache, progress};

/// What to say where the archive's index is missing.
const UPDATE: &str = "run `sudo apt-get update` first (`make` does)";

/// The contents of `package`, as a directory. Fetched where no version of it is in the cache.
///
/// # Errors
/// Where it can't be fetched, or its hash is not the one that Debian signed.
pub fn unpacked(package: &str) -> Result<PathBuf, Error> {
    let _lock = cache::lock(&format!("package-{package}"))?;
    let directory = cache::directory("packages")?.join(package);
    let deb = directory.join("package.deb");
    let recorded = directory.join("sha256");
    if !recorded.exists() {
        fetch(package, &directory)?;
    }
    let expected = fs::read_to_string(&recorded).map_err(files(recorded.display()))?;
    if hash(&deb)? != expected.trim() {
        let (deb, directory) = (deb.display(), directory.display());
        return Err(Error::Failed(format!("{deb} has changed since it was fetched: remove {directory}")));
    }
    let root = directory.join("root");
    if !root.exists() {
        let partial = directory.join("partial");
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&partial))?;
        fs::rename(&partial, &root).map_err(files(root.display()))?;
    }
    Ok(root)
}

/// The newest package whose name starts and ends so, with a number between, in the cache or else in the archive.
///
/// # Errors
/// Where there is none.
pub fn newest(prefix: &str, suffix: &str) -> Result<String, Error> {
    let number = |name: &str| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse::<u32>().ok();
    let fits = |name: &&str| number(name).is_some();
    let directory = cache::directory("packages")?;
    let cached: Vec<String> = fs::read_dir(&directory)
        .map_err(files(directory.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    if let Some(name) = latest(cached.iter().map(String::as_str).filter(fits)) {
        return Ok(name.to_owned());
    }
    let names = run(Command::new("apt-cache").args(["pkgnames", prefix]))?;
    latest(names.lines().filter(fits))
        .map(str::to_owned)
        .ok_or_else(|| Error::Failed(format!("Debian's archive has no package {prefix}*{suffix}: {UPDATE}")))
}

/// The last in the order of the numbers in the names.
fn latest<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names.max_by_key(|name| numbers(name))
}

fn fetch(package: &str, directory: &Path) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(files(directory.display()))?;
    let download = tempfile::tempdir_in(directory).map_err(files(directory.display()))?;
    let shown = run(Command::new("apt-cache").args(["show", "--no-all-versions", package]))
        .map_err(|error| Error::Failed(format!("{error}: {UPDATE}")))?;
    let field = |name: &str| {
        let value = shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.ok_or_else(|| Error::Failed(format!("`apt-cache show {package}` names no {name}: {UPDATE}")))
    };
    let (version, expected) = (field("Version")?, field("SHA256")?);
    let _step = progress::begin(format!("fetching {package} {version}"));
    run(Command::new("apt-get")
        .args(["download", "-q=2", &format!("{package}={version}")])
        .current_dir(&download))?;
    let deb = fs::read_dir(&download)
        .map_err(files(download.path().display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Error::Failed(format!("apt-get download left no package of {package}")))?;
    let actual = hash(&deb)?;
    if actual != expected {
        return Err(Error::Failed(format!("{package} has SHA-256 {actual}, but Debian signed {expected}")));
    }
    fs::rename(&deb, directory.join("package.deb")).map_err(files(deb.display()))?;
    cache::write_whole(&directory.join("sha256"), expected.as_bytes())
}

fn hash(path: &Path) -> Result<String, Error> {
    let contents = fs::read(path).map_err(files(path.display()))?;
    Ok(Sha256::digest(contents).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What a command writes.
///
/// # Errors
/// Where it can't be run, or fails: with what it wrote.
pub fn run(command: &mut Command) -> Result<String, Error> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(files(format!("{name} can't be run")))?;
    let [said, errors] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    if output.status.success() {
        return Ok(said);
    }
    Err(Error::Failed(format!("{name} failed ({}):\n{said}{errors}", output.status)))
}

#[cfg(test)]
mod tests {
    use super::latest;

    #[test]
    fn versions_are_compared_as_numbers() {
        let names = ["linux-image-6.1.0-9-cloud", "linux-image-6.1.0-56-cloud", "linux-image-6.1.0-10-cloud"];
        assert_eq!(latest(names.into_iter()), Some("linux-image-6.1.0-56-cloud"));
        assert_eq!(latest([].into_iter()), None);
    }
}
