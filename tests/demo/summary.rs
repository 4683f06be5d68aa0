//! The table at the end, and whether all went well.

use std::time::Duration;

use api::units::Bytes;

use crate::history::History;

/// Prints what each guest had and how it ended; true where nothing went wrong.
pub fn print(history: &History) -> bool {
    println!("guest   min       max       used              has               ended  OOM kills");
    for (number, guest) in history.guests.iter().enumerate() {
        let used = history.range(number, |now| now.used);
        let has = history.range(number, |now| Some(now.actual));
        println!(
            "{:<6}  {:<8}  {:<8}  {:<16}  {:<16}  {:<5}  {}",
            guest.name,
            guest.min,
            guest.max,
            span(used),
            span(has),
            guest.exit.map_or_else(|| "?".to_owned(), |code| code.to_string()),
            guest.oom_kills.map_or_else(|| "not told".to_owned(), |kills| kills.to_string()),
        );
    }
    let faults = faults(history);
    let held = history.peak(Duration::ZERO, |guest| guest.rss);
    let peaks: Bytes = (0..history.guests.len()).map(|n| history.range(n, |now| Some(now.actual)).1).sum();
    println!(
        "The guests' peaks add up to {peaks}; the host never held more than {held} of its {}.",
        history.budget
    );
    for fault in &faults {
        println!("FAILED: {fault}");
    }
    faults.is_empty()
}

fn span((least, most): (Bytes, Bytes)) -> String {
    format!("{} to {} MiB", least.0 >> 20, most.0 >> 20)
}

/// Everything that must not happen and did.
fn faults(history: &History) -> Vec<String> {
    let mut faults = Vec::new();
    for guest in &history.guests {
        match guest.oom_kills {
            Some(0) => {}
            Some(kills) => faults
                .push(format!("{kills} processes of guest {} were killed for lack of memory", guest.name)),
            None => faults.push(format!("guest {} did not reach its end", guest.name)),
        }
        if guest.exit != Some(0) {
            faults.push(format!(
                "guest {} ended with {:?}: see out/{}.log",
                guest.name, guest.exit, guest.name
            ));
        }
    }
    let held = history.peak(Duration::ZERO, |guest| guest.rss);
    if held > history.budget {
        faults
            .push(format!("the host held {held} for its guests, more than the budget of {}", history.budget));
    }
    match history.settled {
        None => faults.push("the guests never came down to what they start with".to_owned()),
        Some(settled) => {
            let given = history.peak(settled, |guest| guest.given);
            if given > history.budget {
                faults.push(format!(
                    "the guests were given {given}, more than the budget of {}",
                    history.budget
                ));
            }
        }
    }
    let grown = |number: usize| {
        let (least, most) = history.range(number, |now| Some(now.actual));
        most.saturating_sub(least)
    };
    for (number, guest) in history.guests.iter().enumerate() {
        if grown(number) < guest.gain {
            faults.push(format!(
                "no memory moved to guest {}: it had {} more at most",
                guest.name,
                grown(number)
            ));
        }
    }
    faults
}
