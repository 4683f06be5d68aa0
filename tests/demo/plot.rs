//! Memory over time, as a picture (SVG).

use std::path::Path;

use anyhow::{Result, anyhow};
use api::units::Bytes;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::history::{Guest, GuestSample, History};

const SIZE: (u32, u32) = (1000, 1000);
const USED: RGBColor = RGBColor(0x2f, 0x6d, 0xb5);
const HAS: RGBColor = RGBColor(0x10, 0x10, 0x10);
const TARGET: RGBColor = RGBColor(0xe0, 0x7b, 0x00);
const CACHE: RGBColor = RGBColor(0x2f, 0x9e, 0x44);
const LIMIT: RGBColor = RGBColor(0xc0, 0x20, 0x20);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws one chart a guest and one for the host.
pub fn draw(history: &History, path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
    let areas = root.split_evenly((history.guests.len() + 1, 1));
    for (number, guest) in history.guests.iter().enumerate() {
        draw_guest(history, number, guest, &areas[number])?;
    }
    draw_host(history, &areas[history.guests.len()])?;
    root.present().map_err(|error| anyhow!("{error}"))
}

fn mib(bytes: Bytes) -> f64 {
    bytes.0 as f64 / f64::from(1 << 20)
}

/// What one guest had over time; it has gaps where the guest did not answer.
fn points(history: &History, number: usize, part: impl Fn(&GuestSample) -> Option<Bytes>) -> Vec<(f64, f64)> {
    let points = history.samples.iter().filter_map(|sample| {
        let value = part(sample.guests[number].as_ref()?)?;
        Some((sample.time.as_secs_f64(), mib(value)))
    });
    points.collect()
}

/// A line, or the edge of a filled area.
struct Curve {
    points: Vec<(f64, f64)>,
    colour: RGBColor,
    name: &'static str,
}

/// What one chart shows.
struct Chart {
    title: String,
    /// The last second.
    end: f64,
    /// The highest MiB.
    top: f64,
    filled: Curve,
    lines: Vec<Curve>,
    limits: Vec<(Bytes, &'static str)>,
}

fn draw_guest(history: &History, number: usize, guest: &Guest, area: &Area<'_>) -> Result<()> {
    let curve = |part: fn(&GuestSample) -> Option<Bytes>, colour, name| Curve {
        points: points(history, number, part),
        colour,
        name,
    };
    let chart = Chart {
        title: format!("guest {}: MiB over seconds", guest.name),
        end: end(history),
        top: mib(guest.max) * 1.1,
        filled: curve(|now| now.used, USED, "used"),
        lines: vec![
            curve(|now| Some(now.actual), HAS, "has"),
            curve(|now| Some(now.target), TARGET, "target"),
            curve(|now| now.cache, CACHE, "page cache"),
        ],
        limits: vec![(guest.max, "max"), (guest.min, "min")],
    };
    draw_chart(area, &chart)
}

fn draw_host(history: &History, area: &Area<'_>) -> Result<()> {
    let sums = |part: fn(&GuestSample) -> Bytes| {
        history.samples.iter().map(move |sample| (sample.time.as_secs_f64(), mib(sample.sum(part))))
    };
    let settled = history.settled.unwrap_or_default().as_secs_f64();
    // Until balloons have first inflated, what guests could have is more than the host ever gave.
    let given = sums(|guest| guest.given).filter(|(time, _)| *time >= settled).collect();
    let chart = Chart {
        title: "host: MiB over seconds".to_owned(),
        end: end(history),
        top: mib(history.budget) * 1.2,
        filled: Curve { points: sums(|guest| guest.rss).collect(), colour: USED, name: "held" },
        lines: vec![Curve { points: given, colour: HAS, name: "given to guests" }],
        limits: vec![(history.budget, "budget")],
    };
    draw_chart(area, &chart)
}

fn end(history: &History) -> f64 {
    history.samples.last().map_or(1.0, |sample| sample.time.as_secs_f64())
}

fn draw_chart(area: &Area<'_>, what: &Chart) -> Result<()> {
    let wrong = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let mut chart = ChartBuilder::on(area)
        .caption(&what.title, ("sans-serif", 18))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(48)
        // Room for the legend on the right.
        .build_cartesian_2d(0.0..what.end * 1.15, 0.0..what.top)
        .map_err(|e| wrong(&e))?;
    let whole = |value: &f64| format!("{value:.0}");
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .draw()
        .map_err(|e| wrong(&e))?;
    let fill = what.filled.colour.mix(0.35);
    chart
        .draw_series(AreaSeries::new(what.filled.points.iter().copied(), 0.0, fill))
        .map_err(|e| wrong(&e))?
        .label(what.filled.name)
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], fill.filled()));
    for line in &what.lines {
        let stroke = line.colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), stroke))
            .map_err(|e| wrong(&e))?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], stroke));
    }
    for (limit, name) in &what.limits {
        let line = [(0.0, mib(*limit)), (what.end, mib(*limit))];
        chart
            .draw_series(LineSeries::new(line, LIMIT.mix(0.6)))
            .map_err(|e| wrong(&e))?
            .label(format!("{name} {limit}"))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], LIMIT.mix(0.6)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .draw()
        .map_err(|e| wrong(&e))
}
