//! The programs that the lab runs, built from this tree.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::error::files;
use crate::{Error, inside, progress};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where `ballast` lies in an emulated host.
pub const BALLAST_INSIDE: &str = "/bin/ballast";

/// A program of this tree. It is built where the sources are newer, once in a process.
struct Artifact {
    arguments: &'static [&'static str],
    built: OnceLock<PathBuf>,
}

/// The command. Always optimised, as under emulation size and speed count.
static BALLAST: Artifact = Artifact::new(&["--package", "cli", "--profile", "release", "--bin", "ballast"]);
static GUEST_INIT: Artifact =
    Artifact::new(&["--package", "lab-init", "--profile", "guest", "--bin", "guest-init"]);
static AGENT: Artifact =
    Artifact::new(&["--package", "agent", "--profile", "guest", "--bin", "ballast-agent"]);

/// The `ballast` command where this runs: in an emulated host the one that was put there.
///
/// # Errors
/// Where it can't be built.
pub fn ballast() -> Result<PathBuf, Error> {
    if inside() { Ok(PathBuf::from(BALLAST_INSIDE)) } else { BALLAST.path() }
}

/// The init of the lab's machines.
///
/// # Errors
/// Where it can't be built.
pub fn guest_init() -> Result<PathBuf, Error> {
    GUEST_INIT.path()
}

/// The agent that guests may run.
///
/// # Errors
/// Where it can't be built.
pub fn agent() -> Result<PathBuf, Error> {
    AGENT.path()
}

/// The unit tests of one of this tree's libraries, as a program.
///
/// # Errors
/// Where they can't be built.
pub fn unit_tests(package: &str) -> Result<PathBuf, Error> {
    cargo("test", &["--no-run", "--package", package, "--lib"])
}

impl Artifact {
    const fn new(arguments: &'static [&'static str]) -> Self {
        Self { arguments, built: OnceLock::new() }
    }

    fn path(&self) -> Result<PathBuf, Error> {
        if let Some(path) = self.built.get() {
            return Ok(path.clone());
        }
        let path = cargo("build", self.arguments)?;
        Ok(self.built.get_or_init(|| path).clone())
    }
}

/// Builds a program, and gives the path where it is then.
fn cargo(command: &str, arguments: &[&str]) -> Result<PathBuf, Error> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let step = progress::begin(format!("building {}", arguments.last().unwrap_or(&command)));
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([command, "--quiet", "--message-format", "json-render-diagnostics", "--target", TARGET])
        .args(arguments)
        .current_dir(here.parent().unwrap_or(here))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(files("cargo can't be run"))?;
    let (mut count, mut program) = (0, None);
    for line in build.stdout.take().into_iter().flat_map(|output| BufReader::new(output).lines()) {
        let Some(artifact) = line.ok().and_then(|line| Built::read(&line)) else { continue };
        if artifact.is_new {
            count += 1;
            step.say(&format!("{count} crates, {} the last", artifact.name));
        }
        program = artifact.program.or(program);
    }
    let status = build.wait().map_err(files("cargo"))?;
    match program {
        Some(program) if status.success() => Ok(program),
        _ => Err(Error::Failed(format!("`cargo {command} {}` failed ({status})", arguments.join(" ")))),
    }
}

/// What a message of cargo's says of something that is built.
#[derive(Debug, PartialEq, Eq)]
struct Built {
    name: String,
    is_new: bool,
    program: Option<PathBuf>,
}

impl Built {
    /// `None` for other messages.
    fn read(message: &str) -> Option<Self> {
        let message: serde_json::Value = serde_json::from_str(message).ok()?;
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        (message["reason"] == "compiler-artifact").then_some(())?;
        let program = text(&message["executable"]).map(PathBuf::from);
        Some(Self { name: text(&message["target"]["name"])?, is_new: message["fresh"] == false, program })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_tells_what_it_has_built() {
        let message = |executable| {
            format!(
                "{{\"reason\":\"compiler-artifact\",\"target\":{{\"name\":\"x\"}},\"fresh\":false,\
                 \"executable\":{executable}}}"
            )
        };
        let expected = |program| Some(Built { name: "x".to_owned(), is_new: true, program });
        assert_eq!(Built::read(&message("null")), expected(None));
        assert_eq!(Built::read(&message("\"/t/x\"")), expected(Some("/t/x".into())));
        assert_eq!(Built::read("{\"reason\":\"build-finished\",\"success\":true}"), None);
    }
}
