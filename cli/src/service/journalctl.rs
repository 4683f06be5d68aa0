//! What the journal has of a VM.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::systemctl::unit;
use super::{LogsArgs, Scope};
use crate::failure::Failure;

/// Which entries are a VM's: those that match all words up to a `+`, or all behind it. Anybody on the host may write
/// `BALLAST_VM`, so who wrote it is asked as well; fields that begin with `_` are the journal's own word.
fn matches(scope: &Scope, name: &str, events: bool) -> Vec<String> {
    let unit = unit(name);
    let (uid, of_service, of_manager) = match scope {
        Scope::System => (0, "_SYSTEMD_UNIT", "UNIT"),
        Scope::User(uid) => (*uid, "_SYSTEMD_USER_UNIT", "USER_UNIT"),
    };
    let of_user = format!("_UID={uid}");
    let mut groups = vec![vec![format!("BALLAST_VM={name}"), of_user.clone()]];
    if !events {
        groups.push(vec![format!("{of_service}={unit}"), of_user.clone()]);
        groups.push(vec![format!("{of_manager}={unit}"), of_user]);
    }
    groups.join(&"+".to_owned())
}

/// Has journalctl show what was asked for.
///
/// # Errors
/// It can't be run, or fails, of which it says more itself.
pub fn show(scope: &Scope, args: &LogsArgs) -> Result<(), Failure> {
    let mut command = Command::new("journalctl");
    command.arg(if args.json { "--output=json" } else { "--output=short" }).arg("--quiet");
    if args.follow {
        command.arg("--follow");
    }
    if let Some(lines) = args.lines {
        command.arg(format!("--lines={lines}"));
    }
    if let Some(since) = &args.since {
        command.arg(format!("--since={since}"));
    }
    let status = command.args(matches(scope, &args.name, args.events)).status().map_err(|error| {
        Failure::new(format!("can't run journalctl: {error}; it belongs to the package systemd"))
    })?;
    match (status.success(), status.signal()) {
        // Its reader has seen enough.
        (true, _) | (_, Some(libc::SIGPIPE | libc::SIGINT)) => Ok(()),
        _ => Err(Failure::new(format!(
            "the log of {} can't be shown: journalctl ended with {status}",
            args.name
        ))),
    }
}

/// The last line that a VM's service wrote, where it can be read.
pub fn last_line(scope: &Scope, name: &str) -> Option<String> {
    let of_service = match scope {
        Scope::System => "_SYSTEMD_UNIT",
        Scope::User(_) => "_SYSTEMD_USER_UNIT",
    };
    let output = Command::new("journalctl")
        .args(["--quiet", "--output=cat", "--lines=1", &format!("{of_service}={}", unit(name))])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    // A guest's console may be the last that spoke.
    let line = api::text::clean(text.trim());
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_elses_words_are_taken_for_a_vms() {
        assert_eq!(
            matches(&Scope::System, "web", false).join(" "),
            "BALLAST_VM=web _UID=0 + _SYSTEMD_UNIT=ballast@web.service _UID=0 + UNIT=ballast@web.service _UID=0"
        );
        assert_eq!(matches(&Scope::User(1000), "web", true), ["BALLAST_VM=web", "_UID=1000"]);
        for group in matches(&Scope::User(1000), "web", false).split(|word| word == "+") {
            assert!(group.contains(&"_UID=1000".to_owned()), "{group:?}");
        }
    }
}
