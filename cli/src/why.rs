//! `ballast why`.

use std::fmt::Write;
use std::time::Duration;

use api::runtime;
use balancer::daemon::client::{Client, Error};
use balancer::daemon::{DecisionView, Fate, MemoryView, Why};

use crate::failure::Failure;
use crate::{client, output};

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Say why a VM has the memory that it has
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ballast why web
  ballast why web --json

The balancer that runs answers, with its last decisions about the VM and every number that each
was made of, the newest first. It keeps 32 of them, in memory: one that was started anew knows only
its own.")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    // A name that none may have is told from one that nobody has.
    runtime::socket(&args.name)?;
    let mut daemon = Client::new(&runtime::directory()?, PATIENCE);
    let why = client::block_on(async { daemon.why(&args.name).await.map_err(Failure::from) })?;
    if args.json { output::json(&why) } else { output::text(&describe(&why)) }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error)
    }
}

fn describe(why: &Why) -> String {
    // Writing to a String does not fail.
    let mut text = format!("{}: {}\n", why.name, why.sentence);
    if let Some(MemoryView { limits, used, demand, entitlement, target, actual, charge, .. }) = &why.memory {
        let used = used.map_or("unknown".to_owned(), |used| used.to_string());
        let _ = writeln!(
            text,
            "  used {used}   wants {demand}   may have {entitlement}   target {target}   has {actual}   \
             charged {charge}\n  limits {limits}"
        );
    }
    if why.decisions.is_empty() {
        text.push_str("\nNothing was decided about it since the balancer started.\n");
    } else {
        text.push_str("\nDecided, the newest first:\n");
        for decision in &why.decisions {
            let _ = writeln!(text, "{:>8} ago  {}", age(decision.age_ms), sentence(decision));
        }
    }
    // The first one is how it was found.
    if why.standings.len() > 1 {
        text.push_str("\nHow it stood, the newest first:\n");
        for standing in &why.standings {
            let _ = writeln!(text, "{:>8} ago  {}", age(standing.age_ms), standing.standing);
        }
    }
    text
}

fn sentence(decision: &DecisionView) -> String {
    let mut text = decision.sentence.clone();
    let error = decision.error.as_deref().unwrap_or("no reason given");
    // Writing to a String does not fail.
    let _ = match decision.fate {
        Fate::Taken => Ok(()),
        Fate::Advised => write!(text, "; advised, and left to the host's operator"),
        Fate::Refused => write!(text, "; refused: {error}"),
        Fate::Unanswered => write!(text, "; not confirmed: {error}"),
        Fate::Postponed => {
            write!(text, "; put off, as it owed an answer or somebody else sets its target too")
        }
    };
    if decision.times > 1 {
        let _ = write!(text, " ({} times)", decision.times);
    }
    text
}

/// A span as people say it, in its largest unit.
fn age(milliseconds: u64) -> String {
    match milliseconds / 1000 {
        0..60 => format!("{:.1} s", milliseconds as f64 / 1000.0),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let ages: Vec<_> = [0, 1_500, 59_999, 60_000, 7_200_000, 259_200_000].into_iter().map(age).collect();
        assert_eq!(ages, ["0.0 s", "1.5 s", "60.0 s", "1 min", "2 h", "3 d"]);
    }

    #[test]
    fn an_answer_reads_as_sentences() {
        let why: Why = serde_json::from_str(
            r#"{"name":"web","standing":"following","sentence":"It uses 280 MiB.","report_age_ms":200,
            "memory":{"limits":{"startup":268435456,"min":134217728,"max":1073741824},"used":293601280,
              "demand":352321536,"entitlement":352321536,"target":352321536,"actual":352321536,
              "host_rss":300000000,"charge":352321536},
            "decisions":[{"vm":"web","age_ms":1200,"fate":"refused","complaint":"no driver","times":3,
              "used":293601280,"demand":352321536,"entitlement":352321536,"state":"soft","rule":"grow",
              "old":268435456,"new":352321536,"sentence":"grow 256 MiB -> 336 MiB"}],
            "standings":[{"age_ms":5000,"standing":"following"},{"age_ms":65000,"standing":"booting"}]}"#,
        )
        .unwrap();
        let text = describe(&why);
        for line in [
            "web: It uses 280 MiB.",
            "used 280 MiB   wants 336 MiB",
            "1.2 s ago  grow 256 MiB -> 336 MiB; refused: no driver (3 times)",
            "5.0 s ago  following",
            "1 min ago  booting",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
