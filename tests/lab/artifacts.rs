//! The programs that the lab runs, built from this tree.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where `ballast` lies in an emulated host.
pub const BALLAST_INSIDE: &str = "/bin/ballast";

/// The `ballast` command that a test should run. On this machine it is built first
/// where the sources are newer: always optimised, as under emulation size and speed count.
///
/// # Panics
/// Where it can't be built; there is nothing to test then.
pub fn ballast() -> PathBuf {
    if crate::inside() {
        return PathBuf::from(BALLAST_INSIDE);
    }
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build("cli", "release", "ballast").expect("ballast must build")).clone()
}

/// The init of the lab's machines.
///
/// # Errors
/// Where it can't be built.
pub fn guest_init() -> Result<PathBuf> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = BUILT.get() {
        return Ok(path.clone());
    }
    let path = build("guest", "guest", "guest-init")?;
    Ok(BUILT.get_or_init(|| path).clone())
}

/// The agent that guests may run.
///
/// # Errors
/// Where it can't be built.
pub fn agent() -> Result<PathBuf> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = BUILT.get() {
        return Ok(path.clone());
    }
    let path = build("agent", "guest", "ballast-agent")?;
    Ok(BUILT.get_or_init(|| path).clone())
}

fn build(package: &str, profile: &str, binary: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in a workspace")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--package", package, "--profile", profile, "--target", TARGET])
        .current_dir(root)
        .stdin(Stdio::null())
        .status()
        .context("cargo can't be run")?;
    ensure!(status.success(), "{binary} did not build: run `cargo build --package {package}` to see why");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join(TARGET).join(profile).join(binary))
}
