//! The keys of a VM's file: the names of options.

use clap::{Arg, ArgAction, Command};

use super::OPTION;

/// The least likeness, from 0 to 1, at which a key is taken for another one.
const ALIKE: f64 = 0.75;

/// The options of `ballast run` that a file may have.
pub fn keys(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| {
        let takes_part = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append | ArgAction::SetTrue);
        takes_part && !arg.is_hide_set() && !matches!(arg.get_long(), None | Some(OPTION))
    })
}

/// An option's key: its name with `_` for `-`, as the balancer's settings are written.
pub fn key(arg: &Arg) -> Option<String> {
    arg.get_long().map(|long| long.replace('-', "_"))
}

/// What is said of a key that there is not, with the nearest that there is.
pub fn unknown(command: &Command, name: &str) -> String {
    let likeness = |key: String| (strsim::jaro_winkler(&key, &name.to_lowercase()), key);
    let nearest = keys(command).filter_map(key).map(likeness).max_by(|(a, _), (b, _)| a.total_cmp(b));
    match nearest {
        Some((alike, key)) if alike >= ALIKE => format!("there is no `{name}`; did you mean `{key}`?"),
        _ => format!("there is no `{name}`; keys are the options that `ballast run --help` names"),
    }
}
