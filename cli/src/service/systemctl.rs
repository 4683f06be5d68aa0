//! What systemd is asked to do with the unit of a VM.

use std::io;
use std::path::Path;
use std::process::{Command, Output};

use super::Scope;
use crate::failure::Failure;

/// A directory that is there where systemd runs (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// systemctl, for the services of one scope.
pub struct Systemctl {
    scope: Scope,
}

/// Why systemd can't be asked.
pub struct NoSystemd(&'static str);

impl NoSystemd {
    /// With what starts the VM all the same.
    pub fn or_run(self, name: &str, file: &Path) -> Failure {
        let why = self.0;
        Failure::new(format!(
            "{why}: start the VM by `ballast run --config {} --name {name}`",
            file.display()
        ))
    }
}

impl From<NoSystemd> for Failure {
    fn from(NoSystemd(why): NoSystemd) -> Self {
        Self::new(format!("{why}: it has no services here"))
    }
}

/// How the unit of a VM is.
#[derive(Debug, PartialEq, Eq)]
pub struct Unit {
    /// systemd has found it.
    pub is_there: bool,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Active,
    /// Before or between starts, or on its way to the end.
    Moving,
    Off,
}

impl Unit {
    /// Whether its guest runs.
    pub fn is_active(&self) -> bool {
        self.state == State::Active
    }

    /// Whether systemd has, or will start, a process of it.
    pub fn runs(&self) -> bool {
        self.state != State::Off
    }

    /// From what `systemctl show` says of LoadState and ActiveState; `None` where it says neither.
    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let state = match value("ActiveState")? {
            "active" | "reloading" => State::Active,
            "activating" | "deactivating" => State::Moving,
            _ => State::Off,
        };
        Some(Self { is_there: value("LoadState")? == "loaded", state })
    }
}

/// The unit of a VM.
pub fn unit(name: &str) -> String {
    format!("ballast@{name}.service")
}

impl Systemctl {
    /// For the services of `scope`.
    ///
    /// # Errors
    /// systemd does not run this host.
    pub fn of(scope: Scope) -> Result<Self, NoSystemd> {
        if Path::new(BOOTED).exists() {
            Ok(Self { scope })
        } else {
            Err(NoSystemd("systemd does not run here"))
        }
    }

    /// Whose services.
    pub const fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Has `verb` done to the unit of a VM, and waits until it is done.
    ///
    /// # Errors
    /// With what systemctl said.
    pub fn run(&self, verb: &str, name: &str) -> Result<(), Failure> {
        let unit = unit(name);
        let output = self.output(&[verb, &unit])?;
        if output.status.success() {
            return Ok(());
        }
        Err(Failure::new(format!(
            "`systemctl {} {verb} {unit}` failed: {}",
            self.scope.option(),
            String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")
        )))
    }

    /// How the unit of a VM is.
    ///
    /// # Errors
    /// systemd does not answer, as where a user has no session.
    pub fn unit(&self, name: &str) -> Result<Unit, Failure> {
        let output = self.output(&["show", "--property=LoadState,ActiveState", &unit(name)])?;
        if output.status.success() {
            return Unit::parse(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
                Failure::new(format!(
                    "systemd does not say how {} is: look by `systemctl status`",
                    unit(name)
                ))
            });
        }
        let hint = match self.scope {
            Scope::System => "",
            Scope::User(_) => "; log in by a session of your own (ssh, machinectl), not by su or sudo",
        };
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Failure::new(format!("systemd does not answer: {}{hint}", said.trim().replace('\n', "; "))))
    }

    fn output(&self, words: &[&str]) -> Result<Output, Failure> {
        let mut command = Command::new("systemctl");
        command.args([self.scope.option(), "--no-ask-password", "--no-pager"]).args(words);
        command.output().map_err(|error: io::Error| {
            Failure::new(format!("can't run systemctl: {error}; it belongs to the package systemd"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_known_by_its_states() {
        let parse = |load, active| {
            Unit::parse(&format!("LoadState={load}\nActiveState={active}\n")).expect("both are there")
        };
        assert_eq!(parse("loaded", "active"), Unit { is_there: true, state: State::Active });
        assert_eq!(parse("not-found", "inactive"), Unit { is_there: false, state: State::Off });
        // A guest that reboots.
        assert!(parse("loaded", "activating").runs() && !parse("loaded", "activating").is_active());
        assert!(!parse("loaded", "failed").runs());
        assert_eq!(Unit::parse(""), None, "nothing said is not that it is off");
    }
}
