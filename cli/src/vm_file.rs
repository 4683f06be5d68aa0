//! A VM as a file, `ballast run --config`: TOML with the words of the options, of which nothing is written down a
//! second time here. What clap knows of the options says which keys there are, and what they take.

mod keys;
mod mistake;
pub mod schema;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args as _, Command, CommandFactory, Parser};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use self::keys::{key, keys};
use self::mistake::{Line, Mistakes};
use crate::failure::Failure;
use crate::{RunAlone, run};

/// What a file may have: far more than any VM's.
const LONGEST: u64 = 1 << 20;

/// The option that names the file.
const OPTION: &str = "config";

/// The words of a command line of `ballast run`, with those of the file that it names before its own.
///
/// What the command line itself says goes before the file, and so it does for what can't be used together with it.
/// A command line that names no file, or is not understood, is given back as it is.
///
/// # Errors
/// Everything that is wrong with the file, each with its line.
pub fn expanded(words: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let names_a_file = |word: &OsString| word.to_string_lossy().starts_with("--config");
    if !words.iter().any(names_a_file) {
        return Ok(words);
    }
    // The file may have what the command line lacks.
    let command =
        RunAlone::command().ignore_errors(true).mut_subcommand("run", |run| run.ignore_errors(true));
    let Ok(matches) = command.try_get_matches_from(&words) else { return Ok(words) };
    let Some(given) = matches.subcommand_matches("run") else { return Ok(words) };
    let Some(path) = given.get_one::<PathBuf>(OPTION) else { return Ok(words) };
    // Before it are options without a value alone.
    let place = words.iter().skip(1).position(|word| word == "run").map_or(words.len(), |found| found + 2);
    let (before, after) = words.split_at(place.min(words.len()));
    let said = arguments(path, &read(path)?, given)?;
    Ok([before, &said, after].concat())
}

/// Says everything that is wrong with a VM's file.
///
/// # Errors
/// As [`expanded`]; besides where something is missing, or can't go together.
pub fn check(path: &Path) -> Result<(), Failure> {
    let none = options().ignore_errors(true).try_get_matches_from(["run"]).map_err(Failure::usage)?;
    let said = arguments(path, &read(path)?, &none)?;
    let words = [OsStr::new("ballast"), OsStr::new("run")].into_iter().map(OsStr::to_owned).chain(said);
    RunAlone::try_parse_from(words)
        .map(drop)
        .map_err(|error| Failure::usage(format!("{}: {}", path.display(), mistake::sentence(&error))))
}

fn read(path: &Path) -> Result<String, Failure> {
    let read = || {
        let mut text = String::new();
        let length = File::open(path)?.take(LONGEST + 1).read_to_string(&mut text)?;
        if u64::try_from(length).is_ok_and(|length| length <= LONGEST) {
            return Ok(text);
        }
        Err(io::Error::other(format!("it is longer than {LONGEST} bytes")))
    };
    read().map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))
}

fn options() -> Command {
    run::Args::augment_args(Command::new("run"))
}

/// What a file says, as words for the command line that `given` has.
fn arguments(path: &Path, text: &str, given: &ArgMatches) -> Result<Vec<OsString>, Failure> {
    let mut command = options();
    command.build();
    let overruled = overruled(&command, given);
    let mut mistakes = Mistakes::of(path);
    let mut words = Vec::new();
    let (table, errors) = DeTable::parse_recoverable(text);
    errors.iter().for_each(|error| mistakes.add(Line::of_error(text, error), error.message().to_owned()));
    if !errors.is_empty() {
        // What follows such a mistake would be guesswork.
        return mistakes.none().map(|()| words);
    }
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    // As they stand in the file: disks of a command line have an order.
    entries.sort_by_key(|(name, _)| name.span().start);
    for (name, value) in entries {
        let line = Line::at(text, name.span().start);
        let Some(arg) = keys(&command).find(|arg| key(arg).as_deref() == Some(name.get_ref())) else {
            mistakes.add(line, keys::unknown(&command, name.get_ref()));
            continue;
        };
        let said = match option(arg, value) {
            Ok(said) => said,
            Err(wanted) => {
                let is = value.get_ref().type_str();
                mistakes.add(line, format!("`{}` is {wanted}, and here it is of type {is}", name.get_ref()));
                continue;
            }
        };
        for word in &said {
            // Alone: the line of what is wrong is known then.
            match options().try_get_matches_from(["run".as_ref(), word.as_os_str()]) {
                // Others may be missing, which the whole tells.
                Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
                    mistakes.add(line, mistake::sentence(&error));
                }
                _ => {}
            }
        }
        if !overruled.contains(&arg.get_id().as_str()) {
            words.extend(said);
        }
    }
    mistakes.none().map(|()| words)
}

/// The options that the command line gives, and those that can't be used with them.
fn overruled<'c>(command: &'c Command, given: &ArgMatches) -> Vec<&'c str> {
    let is_given =
        |arg: &clap::Arg| given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let conflicts = |arg: &clap::Arg| command.get_arg_conflicts_with(arg).into_iter().any(is_given);
    let conflicted: Vec<&str> = keys(command)
        .filter(|arg| is_given(arg))
        .flat_map(|arg| command.get_arg_conflicts_with(arg))
        .map(|arg| arg.get_id().as_str())
        .collect();
    keys(command)
        .filter(|arg| is_given(arg) || conflicts(arg) || conflicted.contains(&arg.get_id().as_str()))
        .map(|arg| arg.get_id().as_str())
        .collect()
}

/// A key and its value as words of a command line.
///
/// # Errors
/// What the value has to be.
fn option(arg: &clap::Arg, value: &Spanned<DeValue<'_>>) -> Result<Vec<OsString>, &'static str> {
    let long = arg.get_long().unwrap_or_default();
    let word = |value: String| OsString::from(format!("--{long}={value}"));
    let value = value.get_ref();
    match arg.get_action() {
        ArgAction::Append => {
            let wanted = "text, or a list of texts";
            let Some(list) = value.as_array() else { return Ok(vec![word(scalar(value).ok_or(wanted)?)]) };
            list.iter().map(|value| scalar(value.get_ref()).map(word).ok_or(wanted)).collect()
        }
        ArgAction::SetTrue => match value.as_bool().ok_or("true or false")? {
            true => Ok(vec![OsString::from(format!("--{long}"))]),
            false => Ok(Vec::new()),
        },
        _ => Ok(vec![word(scalar(value).ok_or("text or a number")?)]),
    }
}

/// Text, or a number in its words.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => {
            i128::from_str_radix(number.as_str(), number.radix()).ok().map(|number| number.to_string())
        }
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
