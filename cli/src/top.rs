//! `ballast top`.
//!
//! Who tells how things stand is `gather`; what is on the screen and what keys do to it is
//! `view`; from there to cells is `draw`. Only `terminal` knows a terminal.

mod column;
mod draw;
mod editor;
mod gather;
mod history;
mod snapshot;
mod terminal;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod view;

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use api::runtime;
use ratatui::buffer::Buffer;
use ratatui::crossterm::terminal::size;
use ratatui::layout::Rect;

use self::column::Column;
use self::gather::Gatherer;
use self::view::View;
use crate::failure::Failure;
use crate::{client, duration, output};

/// How wide a picture is where no terminal says.
const WIDTH: u16 = 100;

/// Watch the host and its VMs, and why each has the memory that it has
#[derive(clap::Args)]
#[command(after_help = "\
Keys: ? tells them all; q ends, arrows choose a VM and the order, l changes a VM's limits, p pauses
it, / finds a name.

It asks the balancer; where none runs it asks each VM, and says so.

Examples:
  ballast top
  ballast top --sort actual --interval 500ms
  ballast top --once               one picture as text, with every VM and the reasons
  ballast top --json | jq .host    a line of JSON at each interval")]
pub struct Args {
    /// Print one picture and end
    #[arg(long)]
    once: bool,
    /// Print JSON: a line at each interval, or one with --once
    #[arg(long)]
    json: bool,
    /// How often to look
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// What to order VMs by
    #[arg(long, value_name = "COLUMN", default_value = "used")]
    sort: Column,
    /// Order them the other way round
    #[arg(long)]
    reverse: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration::parse(text)?;
    if interval < Duration::from_millis(100) || interval > Duration::from_secs(3600) {
        return Err("choose something from 100ms to 1h".to_owned());
    }
    Ok(interval)
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let directory = runtime::directory()?;
    let view = View::new(args.sort, args.reverse);
    if !args.once && !args.json {
        if !stdout().is_terminal() {
            return Err(Failure::usage("standard output is no terminal: use --once or --json"));
        }
        return terminal::run(view, directory, args.interval);
    }
    client::block_on(async {
        let mut gatherer = Gatherer::new(directory);
        let mut ticks = tokio::time::interval(args.interval);
        loop {
            ticks.tick().await;
            let snapshot = gatherer.gather().await.map_err(Failure::new)?;
            if !args.json {
                return output::text(&picture(view, snapshot, width()));
            }
            let mut line = serde_json::to_string(&snapshot).map_err(Failure::new)?;
            line.push('\n');
            output::text(&line)?;
            if args.once {
                return Ok(());
            }
        }
    })
}

fn width() -> u16 {
    let known = stdout().is_terminal().then(size).and_then(Result::ok);
    known.map_or(WIDTH, |(width, _)| width.max(80))
}

/// All VMs as text, and why each has what it has.
fn picture(mut view: View, snapshot: snapshot::Snapshot, width: u16) -> String {
    let rows = snapshot.vms.len().max(1);
    view.take(Ok(snapshot));
    view.fit(rows);
    // One for the titles.
    let height = draw::HEAD.saturating_add(u16::try_from(rows).unwrap_or(u16::MAX));
    let mut buffer = Buffer::empty(Rect::new(0, 0, width, height));
    draw::top(&view, buffer.area, &mut buffer);
    let lines = buffer.content.chunks(width.into()).map(|cells| {
        let line: String = cells.iter().map(|cell| cell.symbol()).collect();
        line.trim_end().to_owned() + "\n"
    });
    let mut text: String = lines.collect();
    for (vm, _) in view.shown() {
        text.push_str(&format!("{}: {}\n", vm.name, draw::why(&view, vm)));
    }
    text
}
