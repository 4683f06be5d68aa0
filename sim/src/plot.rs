//! Pictures: the service that VMs get under each policy by their number, and memory over time.

mod fleet;

pub use fleet::fleet;

use api::units::Bytes;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::SimulatedHost;
use super::policies::PolicyName;
use super::score::SLO_STALLED_PERMILLE;
use super::sweep::Outcome;
use super::trace::Trace;
use super::world::Snapshot;

const INK: RGBColor = RGBColor(0x22, 0x2b, 0x38);
const FAINT: RGBColor = RGBColor(0x8a, 0x93, 0xa0);
const GRID: RGBColor = RGBColor(0xe6, 0xe9, 0xee);
const OURS: RGBColor = RGBColor(0xe4, 0x57, 0x2e);
const LIMIT: RGBColor = RGBColor(0xc0, 0x1c, 0x28);

/// Stalled time below this is drawn on the floor of the picture, in percent.
const FLOOR: f64 = 0.001;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
#[error("can't draw: {0}")]
pub struct PlotError(String);

type Drawn = Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn colour(policy: PolicyName) -> RGBColor {
    match policy {
        PolicyName::Ballast => OURS,
        PolicyName::HyperV => RGBColor(0x1f, 0x6f, 0xb5),
        PolicyName::Esxi => RGBColor(0x2a, 0x9d, 0x8f),
        PolicyName::Selfballoon => RGBColor(0x7b, 0x5e, 0xa7),
        PolicyName::Mom => RGBColor(0xb8, 0x8a, 0x1b),
        PolicyName::Proxmox => RGBColor(0xa3, 0x4a, 0x6c),
        PolicyName::Squeezed => RGBColor(0x5c, 0x8a, 0x3a),
        PolicyName::Static => RGBColor(0x6b, 0x72, 0x80),
    }
}

fn font<'a>(size: f64, colour: &RGBColor) -> TextStyle<'a> {
    ("sans-serif", size).into_font().color(colour)
}

fn bold<'a>(size: f64, colour: &RGBColor) -> TextStyle<'a> {
    ("sans-serif", size, FontStyle::Bold).into_font().color(colour)
}

fn at(style: TextStyle<'_>, horizontal: HPos, vertical: VPos) -> TextStyle<'_> {
    style.pos(Pos::new(horizontal, vertical))
}

/// The SVG that `draw` draws on a picture of this many pixels.
fn picture(size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> Result<String, PlotError> {
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let drawn = draw(&root).and_then(|()| Ok(root.present()?));
    drop(root);
    drawn.map_err(|error| PlotError(error.to_string())).map(|()| svg)
}

/// Draws how many VMs each policy serves well, and how service falls with their number, as SVG.
///
/// # Errors
/// [`PlotError`] where there is nothing to be drawn of it.
pub fn service(
    outcome: &Outcome,
    policies: &[PolicyName],
    host: &SimulatedHost,
    about: &str,
) -> Result<String, PlotError> {
    picture((1200, 560), |root| draw_service(root, outcome, policies, host, about))
}

fn draw_service(
    root: &Area,
    outcome: &Outcome,
    policies: &[PolicyName],
    host: &SimulatedHost,
    about: &str,
) -> Drawn {
    root.fill(&WHITE)?;
    root.draw_text("How many VMs fit on one host?", &bold(26.0, &INK), (36, 24))?;
    let line = format!(
        "{} host, {} for VMs. Service is good while VMs wait for memory in at most 0.1 % of their time and nothing is killed.",
        host.total,
        host.budget()
    );
    root.draw_text(&line, &font(15.0, &FAINT), (36, 60))?;
    root.draw_text(about, &at(font(12.0, &FAINT), HPos::Left, VPos::Bottom), (36, 546))?;
    let (left, right) = root.margin(92, 36, 28, 28).split_horizontally(500);
    draw_bars(&left, outcome, policies)?;
    draw_curves(&right, outcome, policies)
}

fn draw_bars(area: &Area, outcome: &Outcome, policies: &[PolicyName]) -> Drawn {
    let mut rows: Vec<(PolicyName, usize)> =
        policies.iter().map(|&policy| (policy, outcome.most_vms(policy).unwrap_or(0))).collect();
    rows.sort_by_key(|&(policy, vms)| (std::cmp::Reverse(vms), policy));
    let most = rows.iter().map(|row| row.1).max().unwrap_or(1).max(1);
    area.draw_text("VMs with good service", &bold(15.0, &INK), (8, 4))?;
    let (width, height) = area.dim_in_pixel();
    let (from, step) = (130, (height as i32 - 50) / rows.len().max(1) as i32);
    let scale = (f64::from(width) - 130.0 - 70.0) / most as f64;
    for (index, (policy, vms)) in rows.into_iter().enumerate() {
        let middle = 42 + step * index as i32 + step / 2;
        let ours = policy == PolicyName::Ballast;
        let name = if ours { bold(15.0, &INK) } else { font(15.0, &INK) };
        area.draw_text(policy.title(), &at(name, HPos::Right, VPos::Center), (from - 10, middle))?;
        let end = from + (vms as f64 * scale) as i32;
        let half = (step * 36 / 100).min(20);
        let fill = if ours { OURS } else { RGBColor(0xc3, 0xca, 0xd4) };
        area.draw(&Rectangle::new([(from, middle - half), (end, middle + half)], fill.filled()))?;
        let figure = if vms == 0 { "none".to_owned() } else { vms.to_string() };
        let style = bold(17.0, if ours { &OURS } else { &INK });
        area.draw_text(&figure, &at(style, HPos::Left, VPos::Center), (end + 8, middle))?;
    }
    Ok(())
}

fn draw_curves(area: &Area, outcome: &Outcome, policies: &[PolicyName]) -> Drawn {
    let numbers = || outcome.cells.keys().map(|key| key.1);
    let (Some(least), Some(most)) = (numbers().min(), numbers().max()) else { return Ok(()) };
    let (least, most) = (least as f64, (most as f64).max(least as f64 + 1.0));
    area.draw_text("Time that VMs wait for memory, by their number", &bold(15.0, &INK), (64, 4))?;
    let area = area.margin(30, 0, 0, 120);
    let mut chart = ChartBuilder::on(&area)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 44)
        .build_cartesian_2d(least..most, (FLOOR..100.0).log_scale())?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(FAINT)
        .label_style(font(13.0, &INK))
        .x_labels(((most - least) as usize + 1).min(13))
        .x_label_formatter(&|vms| format!("{vms:.0}"))
        .y_label_formatter(&|percent| if *percent <= FLOOR { "none".into() } else { format!("{percent} %") })
        .x_desc("VMs on the host")
        .axis_desc_style(font(13.0, &FAINT))
        .draw()?;
    let slo = SLO_STALLED_PERMILLE / 10.0;
    chart.draw_series(DashedLineSeries::new([(least, slo), (most, slo)], 6, 4, LIMIT.stroke_width(1)))?;
    let corner = chart.backend_coord(&(most, slo));
    let label = at(font(12.0, &LIMIT), HPos::Right, VPos::Top);
    root_text(&chart, "good service below this line", &label, (corner.0 - 4, corner.1 + 5))?;
    let mut ends: Vec<(i32, PolicyName)> = Vec::new();
    // Ours last, on top of the others.
    for &policy in policies
        .iter()
        .filter(|policy| **policy != PolicyName::Ballast)
        .chain(policies.iter().filter(|policy| **policy == PolicyName::Ballast))
    {
        let points: Vec<(f64, f64, bool)> = outcome
            .cells
            .iter()
            .filter(|((name, _), _)| *name == policy)
            .map(|((_, vms), cell)| {
                (*vms as f64, cell.score.stalled_percent().max(FLOOR), cell.score.killed > 0)
            })
            .collect();
        let stroke = colour(policy).stroke_width(if policy == PolicyName::Ballast { 4 } else { 2 });
        chart.draw_series(LineSeries::new(points.iter().map(|point| (point.0, point.1)), stroke))?;
        chart.draw_series(
            points
                .iter()
                .filter(|point| point.2)
                .map(|point| Cross::new((point.0, point.1), 4, colour(policy).stroke_width(2))),
        )?;
        if let Some(last) = points.last() {
            ends.push((chart.backend_coord(&(last.0, last.1)).1, policy));
        }
    }
    let right = chart.backend_coord(&(most, slo)).0;
    ends.sort_unstable();
    let mut lowest = i32::MIN;
    for (y, policy) in ends {
        let y = y.max(lowest.saturating_add(17));
        lowest = y;
        let style =
            if policy == PolicyName::Ballast { bold(14.0, &OURS) } else { font(13.0, &colour(policy)) };
        root_text(&chart, policy.title(), &at(style, HPos::Left, VPos::Center), (right + 8, y))?;
    }
    let bottom = chart.backend_coord(&(most, FLOOR));
    root_text(
        &chart,
        "x: programs were killed for lack of memory",
        &at(font(12.0, &FAINT), HPos::Right, VPos::Bottom),
        (bottom.0 - 4, bottom.1 - 4),
    )
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::combinators::LogCoord<f64>>,
>;

/// Text at a place of the whole picture, outside of the axes too.
fn root_text(chart: &Chart, text: &str, style: &TextStyle, place: (i32, i32)) -> Drawn {
    let area = chart.plotting_area().strip_coord_spec();
    let (x, y) = area.get_base_pixel();
    area.draw_text(text, style, (place.0 - x, place.1 - y))?;
    Ok(())
}

/// Draws what each VM had, second by second, and what all together demanded, as SVG.
///
/// # Errors
/// [`PlotError`] where there is nothing to be drawn of it.
pub fn memory(
    policy: PolicyName,
    trace: &Trace,
    snapshots: &[Snapshot],
    host: &SimulatedHost,
) -> Result<String, PlotError> {
    picture((1200, 520), |root| draw_memory(root, policy, trace, snapshots, host))
}

fn gib(bytes: Bytes) -> f64 {
    bytes.0 as f64 / (1u64 << 30) as f64
}

fn draw_memory(
    root: &Area,
    policy: PolicyName,
    trace: &Trace,
    snapshots: &[Snapshot],
    host: &SimulatedHost,
) -> Drawn {
    root.fill(&WHITE)?;
    root.draw_text(&format!("Memory over time under {}", policy.title()), &bold(24.0, &INK), (36, 22))?;
    let line = format!(
        "{} VMs, one band each: what it has. Line: what all demand. Dashed: the budget of {}.",
        trace.vms.len(),
        host.budget()
    );
    root.draw_text(&line, &font(15.0, &FAINT), (36, 56))?;
    let every = (snapshots.len() / 600).max(1);
    let shown: Vec<&Snapshot> = snapshots.iter().step_by(every).collect();
    let minutes = |snapshot: &Snapshot| snapshot.now.as_secs_f64() / 60.0;
    let end = shown.last().map_or(1.0, |snapshot| minutes(snapshot)).max(1.0);
    let top = shown.iter().map(|snapshot| gib(snapshot.held)).fold(gib(host.total), f64::max) * 1.04;
    let area = root.margin(84, 14, 16, 36);
    let mut chart = ChartBuilder::on(&area)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 44)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(FAINT)
        .label_style(font(13.0, &INK))
        .axis_desc_style(font(13.0, &FAINT))
        .x_desc("minutes")
        .y_desc("GiB")
        .x_label_formatter(&|minute| format!("{minute:.0}"))
        .y_label_formatter(&|gib| format!("{gib:.0}"))
        .draw()?;
    let mut below = vec![0.0; shown.len()];
    for vm in 0..trace.vms.len() {
        let tops: Vec<f64> = shown
            .iter()
            .zip(&below)
            .map(|(snapshot, below)| {
                let has = snapshot
                    .vms
                    .iter()
                    .find(|(index, _, _)| *index == vm)
                    .map_or(Bytes::ZERO, |(_, _, has)| *has);
                below + gib(has)
            })
            .collect();
        let up = shown.iter().zip(&tops).map(|(snapshot, top)| (minutes(snapshot), *top));
        let back = shown.iter().zip(&below).rev().map(|(snapshot, below)| (minutes(snapshot), *below));
        let hue = 0.55 + 0.14 * f64::from((vm * 7 % 10) as u32) / 10.0;
        let light = if vm % 2 == 0 { 0.72 } else { 0.82 };
        let band: Vec<(f64, f64)> = up.chain(back).collect();
        chart.draw_series([Polygon::new(band, HSLColor(hue, 0.42, light).filled())])?;
        below = tops;
    }
    let demand = shown
        .iter()
        .map(|snapshot| (minutes(snapshot), snapshot.vms.iter().map(|(_, demand, _)| gib(*demand)).sum()));
    chart.draw_series(LineSeries::new(demand, OURS.stroke_width(3)))?;
    let budget = gib(host.budget());
    chart.draw_series(DashedLineSeries::new([(0.0, budget), (end, budget)], 8, 5, LIMIT.stroke_width(2)))?;
    Ok(())
}
