//! `ballast slat run --reload-module`: the same twice, with SLAT as it is and the other way round.
//!
//! What is measured runs in another process: however that ends, this one is still there to put the
//! module back.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, io};

use api::signals;
use slat::reload::Switch;
use slat::report::{Input, side_by_side};
use slat::run::Run;

use super::{RunArgs, writable};
use crate::failure::Failure;
use crate::{output, sentence, table};

/// How often it is looked whether to stop.
const LOOK: Duration = Duration::from_millis(100);

/// Measures, reloads, measures, restores, compares.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let switch = Switch::find(args.even_if_emulated).map_err(Failure::new)?;
    // From here on Ctrl-C ends the measuring, not this process.
    let stop = signals::stop_flag();
    let directory = tempfile::tempdir().map_err(Failure::new)?;
    let names = if switch.is_on() { ["slat-on", "slat-off"] } else { ["slat-off", "slat-on"] };
    let [first_file, second_file] =
        names.map(|name| ResultFile::named(name, directory.path(), args.output.as_deref()));
    for file in [&first_file, &second_file] {
        writable(file.place.as_ref())?;
    }

    sentence::say(format!("measuring with {} first", names[0]));
    let first = first_file.measure(this_without_reload()?, stop)?;
    first_file.keep()?;
    if stop.load(Ordering::SeqCst) {
        let place = first_file.place.as_ref().map(|place| format!("; see {}", place.display()));
        let place = place.unwrap_or_default();
        return Err(Failure::stopped(format!("stopped before the module was touched{place}")));
    }
    sentence::say(format!(
        "reloading; should this process be killed, put things back with: {}",
        switch.rescue()
    ));
    let reloaded = switch.reload().map_err(Failure::new)?;
    let second = match stop.load(Ordering::SeqCst) {
        true => Err(Failure::stopped("stopped while the module was reloaded")),
        false => this_without_reload().and_then(|child| second_file.measure(child, stop)),
    };
    reloaded.restore().map_err(|error| {
        Failure::new(format!("{error}; put the module back by hand: {}", switch.rescue()))
    })?;
    sentence::say("the module is as it was, and a guest says so too");
    let second = second?;

    // A file that can't be written is no reason not to show what was measured.
    let kept = second_file.keep();
    let sides = side_by_side(&first.run, &second.run);
    if args.json {
        output::json(&sides)?;
    } else {
        let head = ["PAYLOAD", "EXITS/OP", "SECOND", "TIME", "SECOND", "SECOND IS"];
        let text = table::render(head, &sides.cells());
        let heading = first.run.heading();
        output::text(&format!("first: {}\n{heading}\nsecond: {}\n{text}", names[0], names[1]))?;
    }
    kept?;
    if stop.load(Ordering::SeqCst) {
        return Err(Failure::stopped("stopped; what was measured by then is shown"));
    }
    // Why it failed it has said itself.
    for (name, measured) in names.into_iter().zip([&first, &second]) {
        if !measured.status.success() {
            let sentence = format!("measuring with {name} was not all it was to be ({})", measured.status);
            return Err(Failure::of_child(measured.status, sentence));
        }
    }
    Ok(())
}

/// What the process that measured wrote, and how it ended.
struct Measured {
    run: Run,
    status: ExitStatus,
}

/// Waits for a process, and stops it where this one is asked to stop: not every signal comes to both.
fn wait(mut child: Child, stop: &AtomicBool) -> io::Result<ExitStatus> {
    let mut told = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if stop.load(Ordering::SeqCst) && !told {
            let id = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
            // SAFETY: a child that was not waited for keeps its number.
            unsafe { libc::kill(id, libc::SIGINT) };
            told = true;
        }
        std::thread::sleep(LOOK);
    }
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
    fn measure(&self, mut child: Command, stop: &AtomicBool) -> Result<Measured, Failure> {
        child.arg("--output").arg(&self.new).stdout(Stdio::null());
        let status = child
            .spawn()
            .and_then(|child| wait(child, stop))
            .map_err(|e| Failure::new(format!("cannot run this program again: {e}")))?;
        // One that was stopped by Ctrl-C, or met a payload that hangs, has written what it has.
        match Input::read_run(&self.new) {
            Ok(run) => Ok(Measured { run, status }),
            Err(error) => Err(Failure::of_child(status, format!("nothing was measured ({status}): {error}"))),
        }
    }

    /// Puts what was measured where the user wants it.
    fn keep(&self) -> Result<(), Failure> {
        let Some(place) = &self.place else { return Ok(()) };
        let text = fs::read_to_string(&self.new)
            .map_err(|error| Failure::new(format!("cannot read {}: {error}", self.new.display())))?;
        output::file(place, &text)
    }
}

/// This very command without the reload.
fn this_without_reload() -> Result<Command, Failure> {
    let mut child = Command::new(std::env::current_exe().map_err(Failure::new)?);
    child.args(without_reload(std::env::args_os().skip(1)));
    Ok(child)
}

/// Paths need not be Unicode, so neither are arguments.
fn without_reload(mut arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.as_bytes() {
            b"--reload-module" | b"--even-if-emulated" | b"--json" => {}
            b"--output" => drop(arguments.next()),
            other if other.starts_with(b"--output=") => {}
            _ => kept.push(argument),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStringExt;

    use slat::run::{Clock, Plan};

    use super::*;

    #[test]
    fn the_second_process_measures_the_same_and_reloads_nothing() {
        let words = "slat run --set quick --output x.json --reload-module --json --passes 1 --output=y";
        let no_unicode = OsString::from_vec(b"--output=\xff".to_vec());
        let kept = without_reload(words.split(' ').map(OsString::from).chain([no_unicode]));
        assert_eq!(kept.join(OsStr::new(" ")), "slat run --set quick --passes 1");
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
        let go_on = AtomicBool::new(false);
        let failure = file.measure(Command::new("false"), &go_on).err().expect("nothing was measured");
        let failure = format!("{failure:?}");
        assert!(failure.contains("exit status: 1"), "{failure}");
        assert_eq!(fs::read_to_string(&place).unwrap(), earlier, "it is not lost either");

        let ready = directory.path().join("ready");
        let later = run_of(2);
        fs::write(&ready, &later).unwrap();
        let mut child = Command::new("sh");
        child.args(["-c", "cp \"$1\" \"$3\"", "sh"]).arg(&ready);
        let measured = file.measure(child, &go_on).unwrap();
        assert!(measured.status.success());
        assert_eq!(measured.run.reasons_failure.as_deref(), Some("run 2"));
        file.keep().unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), later);
    }

    #[test]
    fn what_measures_is_stopped_with_this_process_and_its_code_is_kept() {
        let new = tempfile::tempdir().unwrap();
        let ready = new.path().join("ready");
        fs::write(&ready, run_of(3)).unwrap();
        let file = ResultFile::named("slat-on", new.path(), None);
        let mut child = Command::new("sh");
        // As this program does: at a signal it writes what it has.
        let script = "trap 'cp \"$1\" \"$4\"; exit 130' INT; : > \"$2\"; while :; do sleep 0.1; done";
        let begun = new.path().join("begun");
        child.args(["-c", script, "sh"]).arg(&ready).arg(&begun);
        let stop = AtomicBool::new(false);
        let measured = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !begun.exists() {
                    std::thread::sleep(LOOK);
                }
                stop.store(true, Ordering::SeqCst);
            });
            file.measure(child, &stop).unwrap()
        });
        assert_eq!(measured.status.code(), Some(130));
        assert_eq!(measured.run.reasons_failure.as_deref(), Some("run 3"));
    }
}
