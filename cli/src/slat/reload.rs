//! `ballast slat run --reload-module`: the same twice, with SLAT as it is and the other way round.
//!
//! What is measured runs in another process: however that ends, this one is still there to put the
//! module back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use slat::reload::Switch;
use slat::report::{Input, side_by_side};
use slat::{interrupt, run::Run};

use super::{RunArgs, writable};
use crate::failure::Failure;
use crate::{output, sentence, table};

/// Measures, reloads, measures, restores, compares.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let switch = Switch::find(args.even_if_emulated).map_err(Failure::new)?;
    // From here on Ctrl-C ends the measuring, not this process.
    let stop = interrupt::flag();
    let directory = tempfile::tempdir().map_err(Failure::new)?;
    let names = if switch.is_on() { ["slat-on", "slat-off"] } else { ["slat-off", "slat-on"] };
    let [first_file, second_file] =
        names.map(|name| ResultFile::named(name, directory.path(), args.output.as_deref()));
    for file in [&first_file, &second_file] {
        writable(file.place.as_ref())?;
    }

    sentence::say(format!("measuring with {} first", names[0]));
    let first = first_file.measure(this_without_reload()?)?;
    first_file.keep()?;
    if stop.load(Ordering::SeqCst) {
        return Err(Failure::stopped(format!("stopped before the module was touched; see {}", names[0])));
    }
    sentence::say(format!(
        "reloading; should this process be killed, put things back with: {}",
        switch.rescue()
    ));
    let reloaded = switch.reload().map_err(Failure::new)?;
    let second = this_without_reload().and_then(|child| second_file.measure(child));
    reloaded.restore().map_err(|error| {
        Failure::new(format!("{error}; put the module back by hand: {}", switch.rescue()))
    })?;
    sentence::say("the module is as it was, and a guest says so too");
    let second = second?;

    // A file that can't be written is no reason not to show what was measured.
    let kept = second_file.keep();
    let rows = side_by_side(&first, &second);
    if args.json {
        output::json(&rows)?;
    } else {
        let head = ["PAYLOAD", "EXITS/OP", "SECOND", "TIME", "SECOND", "SECOND IS"];
        let text = table::render(head, &rows);
        output::text(&format!("first: {}\n{}\nsecond: {}\n{text}", names[0], first.heading(), names[1]))?;
    }
    kept?;
    if stop.load(Ordering::SeqCst) {
        return Err(Failure::stopped("stopped; what was measured by then is shown"));
    }
    Ok(())
}

/// What one measuring writes: into a new file, so that an earlier result in the user's is never taken
/// for its own, nor lost where there is none.
struct ResultFile {
    new: PathBuf,
    /// Where the user wants it.
    place: Option<PathBuf>,
}

impl ResultFile {
    fn named(name: &str, directory: &Path, output: Option<&Path>) -> Self {
        let place = output.map(|path| path.with_extension(format!("{name}.json")));
        Self { new: directory.join(name), place }
    }

    /// Runs what measures, and reads what it wrote.
    fn measure(&self, mut child: Command) -> Result<Run, Failure> {
        child.arg("--output").arg(&self.new).stdout(Stdio::null());
        let status =
            child.status().map_err(|e| Failure::new(format!("cannot run this program again: {e}")))?;
        // One that was stopped by Ctrl-C, or met a payload that hangs, has written what it has.
        Input::read_run(&self.new)
            .map_err(|error| Failure::new(format!("nothing was measured ({status}): {error}")))
    }

    /// Puts what was measured where the user wants it.
    fn keep(&self) -> Result<(), Failure> {
        let Some(place) = &self.place else { return Ok(()) };
        let wrong = |error| Failure::new(format!("cannot write {}: {error}", place.display()));
        fs::copy(&self.new, place).map(drop).map_err(wrong)
    }
}

/// This very command without the reload.
fn this_without_reload() -> Result<Command, Failure> {
    let mut child = Command::new(std::env::current_exe().map_err(Failure::new)?);
    child.args(without_reload(std::env::args().skip(1)));
    Ok(child)
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
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use slat::run::{Clock, Plan};

    use super::*;

    #[test]
    fn the_second_process_measures_the_same_and_reloads_nothing() {
        let words = "slat run --set quick --output x.json --reload-module --json --passes 1 --output=y";
        let kept = without_reload(words.split(' ').map(str::to_owned));
        assert_eq!(kept.join(" "), "slat run --set quick --passes 1");
    }

    /// A run in which nothing was measured.
    fn run_of(passes: usize) -> String {
        let plan = Plan {
            setups: Vec::new(),
            passes,
            rounds: 1,
            limit: Duration::from_secs(1),
            clock: Clock::Time,
            reasons: false,
        };
        let mut run = slat::run::run(&plan, &AtomicBool::new(false), |_, _| {});
        run.reasons_failure = Some(format!("run {passes}"));
        serde_json::to_string(&run).unwrap()
    }

    #[test]
    fn an_earlier_result_is_not_taken_for_that_of_a_process_that_died() {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("here.json");
        let place = directory.path().join("here.slat-on.json");
        let earlier = run_of(1);
        fs::write(&place, &earlier).unwrap();
        let new = tempfile::tempdir().unwrap();
        let file = ResultFile::named("slat-on", new.path(), Some(&output));
        let failure = file.measure(Command::new("false")).expect_err("nothing was measured");
        let failure = format!("{failure:?}");
        assert!(failure.contains("exit status: 1"), "{failure}");
        assert_eq!(fs::read_to_string(&place).unwrap(), earlier, "it is not lost either");

        let ready = directory.path().join("ready");
        let later = run_of(2);
        fs::write(&ready, &later).unwrap();
        let mut child = Command::new("sh");
        child.args(["-c", "cp \"$1\" \"$3\"", "sh"]).arg(&ready);
        assert_eq!(file.measure(child).unwrap().reasons_failure.as_deref(), Some("run 2"));
        file.keep().unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), later);
    }
}
