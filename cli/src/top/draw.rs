//! One frame: from what is on the screen to cells.

use api::limits::Limits;
use api::units::Bytes;
use ratatui::buffer::Buffer;
use ratatui::layout::{Position, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Widget, Wrap};

use super::column::Column;
use super::snapshot::{Snapshot, Source, Vm};
use super::view::{Mode, View, written};
use crate::memory::host_rss;

/// The least that a screen must have, in cells.
const SMALLEST: (u16, u16) = (40, 10);

/// Lines above the table's rows: the host's, and the table's titles.
pub const HEAD: u16 = 4;

/// Lines below the table: about the chosen VM, and the keys.
const FOOT: u16 = 6;

/// The least and the most cells that history gets.
const HISTORY: (usize, usize) = (12, 60);

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BAD: Style = Style::new().fg(Color::Red);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

const HELP: &str = "\
Up Down k j    choose a VM             Left Right < >  order by another column
PgUp PgDn      a page                  r               the other way round
Home End g G   the first, the last     /               names that contain a text
l Enter        change its limits       p               pause it, or let it go on
q Esc Ctrl-C   end                     Ctrl-Z          back to the shell

USED is what the guest can't give up without pain, as it says itself; ACTUAL
what it has; TARGET what it was asked to have; MAX the most that it may have;
HOST what the host really holds of it, HUGE the share of that in huge pages;
WANTS its use with its buffer; MAY HAVE what the balancer would let it have.

At the right is what it used in the last minutes: a full bar is the most that
it had in that time.";

/// The rows of VMs that a screen of `height` lines has room for.
pub fn page(height: u16) -> usize {
    usize::from(height.saturating_sub(HEAD + FOOT))
}

/// Draws `view` into `area`; says where the cursor is to stand, if it is to be seen.
pub fn draw(view: &View, area: Rect, buffer: &mut Buffer) -> Option<Position> {
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        let text = format!("ballast top needs {} x {} cells", SMALLEST.0, SMALLEST.1);
        Paragraph::new(text).wrap(Wrap { trim: true }).render(area, buffer);
        return None;
    }
    if view.mode == Mode::Help {
        head(view, area, buffer);
        let room = part(area, HEAD, area.height - HEAD - 1);
        Paragraph::new(HELP).wrap(Wrap { trim: false }).render(room, buffer);
    } else {
        top(view, part(area, 0, area.height - FOOT), buffer);
    }
    let foot = part(area, area.height - FOOT, FOOT);
    let cursor = match &view.mode {
        Mode::Limits { vm, now, line } => limits_editor(vm, now, line, foot, buffer),
        Mode::Help => None,
        Mode::List | Mode::Find(_) => {
            details(view, foot, buffer);
            None
        }
    };
    let last = part(area, area.height - 1, 1);
    cursor.or(bottom(view, last, buffer))
}

/// Draws the host and the table without anything below.
pub fn top(view: &View, area: Rect, buffer: &mut Buffer) {
    head(view, area, buffer);
    table(view, part(area, HEAD - 1, area.height.saturating_sub(HEAD - 1)), buffer);
}

/// `height` lines of `area` from line `from` on.
fn part(area: Rect, from: u16, height: u16) -> Rect {
    Rect { y: area.y + from, height, ..area }.intersection(area)
}

fn put(text: impl Into<Line<'static>>, area: Rect, line: u16, buffer: &mut Buffer) {
    text.into().render(part(area, line, 1), buffer);
}

fn head(view: &View, area: Rect, buffer: &mut Buffer) {
    let Some(snapshot) = &view.snapshot else {
        put("ballast top: asking ...", area, 0, buffer);
        return;
    };
    let host = snapshot.host;
    let mut title =
        vec![Span::styled("ballast top", BOLD), Span::raw(format!("   {}", count(view, snapshot)))];
    match (&snapshot.source, host.budget) {
        (Source::Vms { because }, _) => title
            .push(Span::styled(format!("   {because}: VMs asked directly"), Style::new().fg(Color::Yellow))),
        (Source::Balancer { rounds }, budget) => {
            let state = budget.map(|budget| budget.state).unwrap_or_default();
            let style = if state > Default::default() { BAD } else { Style::new() };
            title.push(Span::styled(format!("   host {state}"), style));
            title.push(Span::styled(format!("   balancer's round {rounds}"), DIM));
        }
    }
    put(Line::from(title), area, 0, buffer);
    let used = host.total.saturating_sub(host.available);
    let width = usize::from(area.width / 5);
    put(
        format!(
            "Host {} {used} of {} used, {} to be had",
            bar(used, host.total, width),
            host.total,
            host.available
        ),
        area,
        1,
        buffer,
    );
    match host.budget {
        Some(budget) => {
            let mut line = format!(
                "VMs  {} {} of {} given, {} free",
                bar(budget.charged, budget.whole, width),
                budget.charged,
                budget.whole,
                budget.free
            );
            if budget.over > Bytes::ZERO {
                line = format!("{line}, {} OVER", budget.over);
            } else if budget.unserved > Bytes::ZERO {
                line = format!("{line}, {} short", budget.unserved);
            }
            let style = if budget.over > Bytes::ZERO { BAD } else { Style::new() };
            put(Line::styled(line, style), area, 2, buffer);
        }
        None => {
            let held: Bytes = snapshot.vms.iter().filter_map(|vm| vm.memory?.host_rss).sum();
            let line = format!(
                "VMs  {} {held} held by the host for them; targets stay as they are",
                bar(held, host.total, width)
            );
            put(line, area, 2, buffer);
        }
    }
}

fn count(view: &View, snapshot: &Snapshot) -> String {
    let (first, last, shown) = view.place();
    let all = snapshot.vms.len();
    let mut text = if all == 1 { "1 VM".to_owned() } else { format!("{all} VMs") };
    if !view.find.is_empty() {
        text = format!("{shown} of {text} with `{}`", view.find);
    }
    if last - first.min(last) + 1 < shown { format!("{text}, {first}-{last} shown") } else { text }
}

fn bar(part: Bytes, whole: Bytes, width: usize) -> String {
    let filled = u128::from(part.0) * width as u128 / u128::from(whole.0.max(1));
    let filled = usize::try_from(filled).unwrap_or(width).min(width);
    format!("{}{}", "█".repeat(filled), "░".repeat(width - filled))
}

/// As many columns as leave room for history.
fn columns(width: usize) -> (Vec<Column>, usize) {
    let mut columns = Vec::new();
    let mut left = width;
    for column in Column::ALL {
        let needed = column.width() + 1;
        if left < needed + HISTORY.0 {
            break;
        }
        left -= needed;
        columns.push(column);
    }
    (columns, left.min(HISTORY.1))
}

fn table(view: &View, area: Rect, buffer: &mut Buffer) {
    let (columns, history) = columns(area.width.into());
    let mut titles: Vec<Span> = Vec::new();
    for &column in &columns {
        let style = if column == view.column { BOLD.add_modifier(Modifier::UNDERLINED) } else { BOLD };
        let text = aligned(column, column.title());
        // Only the title itself is underlined.
        let at = text.find(|character: char| character != ' ').unwrap_or(0);
        let (before, rest) = text.split_at(at);
        let title = rest.trim_end();
        titles.push(Span::raw(before.to_owned()));
        titles.push(Span::styled(title.to_owned(), style));
        titles.push(Span::raw(" ".repeat(rest.len() - title.len() + 1)));
    }
    titles.push(Span::styled("USED, LATELY", BOLD));
    put(Line::from(titles), area, 0, buffer);
    let mut rows = 0;
    for (vm, chosen) in view.shown() {
        rows += 1;
        let row = part(area, rows, 1);
        self::row(view, vm, &columns, history).render(row, buffer);
        if chosen {
            buffer.set_style(row, CHOSEN);
        }
    }
    if rows == 0 && view.snapshot.is_some() {
        let text =
            if view.find.is_empty() { "no VMs: `ballast run` starts one" } else { "no name contains that" };
        put(Line::styled(text, DIM), area, 1, buffer);
    }
}

fn row(view: &View, vm: &Vm, columns: &[Column], history: usize) -> Line<'static> {
    let mut cells: Vec<Span> = Vec::new();
    for &column in columns {
        let trouble = column == Column::Condition && vm.condition.is_trouble();
        let text = format!("{} ", aligned(column, &column.text(vm)));
        cells.push(Span::styled(text, if trouble { BAD } else { Style::new() }));
    }
    cells.push(Span::styled(view.history.line(&vm.name, history), Style::new().fg(Color::Cyan)));
    Line::from(cells)
}

/// `text` in the width of its column; of what is too long the end is cut.
fn aligned(column: Column, text: &str) -> String {
    let width = column.width();
    let text = if text.chars().count() > width {
        text.chars().take(width - 1).chain(['…']).collect()
    } else {
        text.to_owned()
    };
    if column.is_words() { format!("{text:<width$}") } else { format!("{text:>width$}") }
}

fn details(view: &View, area: Rect, buffer: &mut Buffer) {
    put(Line::styled("─".repeat(area.width.into()), DIM), area, 0, buffer);
    let Some(vm) = view.chosen() else { return };
    let text = vec![Line::from(about(vm)), Line::from(why(view, vm))];
    let room = part(area, 1, area.height.saturating_sub(2));
    Paragraph::new(text).wrap(Wrap { trim: true }).render(room, buffer);
}

fn about(vm: &Vm) -> String {
    let Some(memory) = vm.memory else { return format!("{}: {}", vm.name, vm.condition) };
    let report = memory
        .report_age_ms
        .map_or_else(|| "no report yet".to_owned(), |age| format!("report {:.1} s old", age as f64 / 1000.0));
    format!("{}: {}; host holds {}; {report}", vm.name, written(&memory.limits), host_rss(memory.host_rss))
}

/// The last decision about a VM in words.
pub fn why(view: &View, vm: &Vm) -> String {
    match (&vm.reason, view.snapshot.as_ref().map(|snapshot| &snapshot.source)) {
        (Some(reason), _) => format!("last decision: {reason}"),
        (None, Some(Source::Vms { because })) => format!("{because}, so nobody changes its target"),
        (None, _) => "no decision about it yet".to_owned(),
    }
}

fn limits_editor(
    vm: &str,
    now: &Limits,
    line: &super::editor::Line,
    area: Rect,
    buffer: &mut Buffer,
) -> Option<Position> {
    put(Line::styled("─".repeat(area.width.into()), DIM), area, 0, buffer);
    put(
        Line::styled(
            format!("New limits of {vm} (SIZE[,min=SIZE][,max=SIZE][,buffer=PERCENT%][,weight=N]):"),
            BOLD,
        ),
        area,
        1,
        buffer,
    );
    // What is left of a long line is what the cursor doesn't need.
    let width = usize::from(area.width).saturating_sub(3);
    let from = line.cursor().saturating_sub(width);
    let text: String = line.text().chars().skip(from).take(width).collect();
    put(format!("> {text}"), area, 2, buffer);
    let (sentence, style) = judge(&line.text(), now);
    let room = part(area, 3, area.height.saturating_sub(4));
    Paragraph::new(Line::styled(sentence, style)).wrap(Wrap { trim: true }).render(room, buffer);
    let column = u16::try_from(line.cursor() - from + 2).unwrap_or(u16::MAX);
    Some(Position { x: area.x.saturating_add(column), y: area.y + 2 })
}

/// What is to be said of limits that are being typed.
fn judge(text: &str, now: &Limits) -> (String, Style) {
    match text.trim().parse::<Limits>() {
        Err(error) => (error.to_string(), BAD),
        Ok(limits) if limits == *now => ("as they are now".to_owned(), DIM),
        Ok(limits) if !limits.is_dynamic() => {
            (format!("static: it keeps {}, whatever others need", limits.max()), Style::new())
        }
        Ok(limits) => (
            format!("between {} and {}, {}% spare", limits.min(), limits.max(), limits.buffer_percent()),
            Style::new(),
        ),
    }
}

fn bottom(view: &View, area: Rect, buffer: &mut Buffer) -> Option<Position> {
    if let Some(notice) = &view.notice {
        let style = if notice.is_failure { BAD } else { BOLD };
        put(Line::styled(notice.text.clone(), style), area, 0, buffer);
        return None;
    }
    let keys = match &view.mode {
        Mode::Find(line) => {
            let text = format!("find: {}", line.text());
            put(text, area, 0, buffer);
            let column = u16::try_from(line.cursor() + 6).unwrap_or(u16::MAX);
            return Some(Position { x: area.x.saturating_add(column).min(area.right() - 1), y: area.y });
        }
        Mode::Limits { .. } => "Enter sets them   Esc leaves them as they are",
        Mode::Help => "any key goes back",
        Mode::List => "q end  ? help  ↑↓ choose  ←→ order  r reverse  / find  l limits  p pause",
    };
    put(Line::styled(keys, DIM), area, 0, buffer);
    None
}
