//! `ballast slat run --reload-module`: the same twice, with SLAT as it is and the other way round.
//!
//! What is measured runs in another process: however that ends, this one is still there to put the
//! module back.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use slat::reload::Switch;
use slat::report::{Input, side_by_side};
use slat::{interrupt, run::Run};

use super::RunArgs;
use crate::failure::Failure;
use crate::{output, sentence, table};

/// Measures, reloads, measures, restores, compares.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let switch = Switch::find(args.even_if_emulated).map_err(Failure::new)?;
    // From here on Ctrl-C ends the measuring, not this process.
    let stop = interrupt::flag();
    let directory = tempfile::tempdir().map_err(Failure::new)?;
    let place = |name: &str| match &args.output {
        Some(path) => path.with_extension(format!("{name}.json")),
        None => directory.path().join(name),
    };
    let names = if switch.is_on() { ["slat-on", "slat-off"] } else { ["slat-off", "slat-on"] };
    let [first_file, second_file] = names.map(place);

    sentence::say(format!("measuring with {} first", names[0]));
    let first = measure(&first_file)?;
    if stop.load(Ordering::SeqCst) {
        return Err(Failure::stopped(format!("stopped before the module was touched; see {}", names[0])));
    }
    sentence::say(format!(
        "reloading; should this process be killed, put things back with: {}",
        switch.rescue()
    ));
    let reloaded = switch.reload().map_err(Failure::new)?;
    let second = measure(&second_file);
    reloaded.restore().map_err(|error| {
        Failure::new(format!("{error}; put the module back by hand: {}", switch.rescue()))
    })?;
    sentence::say("the module is as it was, and a guest says so too");
    let second = second?;

    let rows = side_by_side(&first, &second);
    if args.json {
        output::json(&rows)?;
    } else {
        let head = ["PAYLOAD", "EXITS/OP", "SECOND", "TIME", "SECOND", "SECOND IS"];
        let text = table::render(head, &rows);
        output::text(&format!("first: {}\n{}\nsecond: {}\n{text}", names[0], first.heading(), names[1]))?;
    }
    if stop.load(Ordering::SeqCst) {
        return Err(Failure::stopped("stopped; what was measured by then is shown"));
    }
    Ok(())
}

/// This very command without the reload, into a file.
fn measure(file: &Path) -> Result<Run, Failure> {
    let this = std::env::current_exe().map_err(Failure::new)?;
    let mut child = Command::new(this);
    child.args(without_reload(std::env::args().skip(1))).arg("--output").arg(file).stdout(Stdio::null());
    let status = child.status().map_err(|e| Failure::new(format!("cannot run this program again: {e}")))?;
    // One that was stopped by Ctrl-C, or met a payload that hangs, has written what it has.
    Input::read_run(file).map_err(|error| Failure::new(format!("nothing was measured ({status}): {error}")))
}

fn without_reload(arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--reload-module" | "--even-if-emulated" | "--json" => {}
            "--output" => drop(arguments.next()),
            other if other.starts_with("--output=") => {}
            _ => kept.push(argument),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn the_second_process_measures_the_same_and_reloads_nothing() {
        let words = "slat run --set quick --output x.json --reload-module --json --passes 1 --output=y";
        let kept = without_reload(words.split(' ').map(str::to_owned));
        assert_eq!(kept.join(" "), "slat run --set quick --passes 1");
        assert_eq!(
            PathBuf::from("a/here.json").with_extension("slat-on.json"),
            PathBuf::from("a/here.slat-on.json")
        );
    }
}
