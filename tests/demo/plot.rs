//! Memory over time, as a picture (SVG).

use std::path::Path;

use anyhow::{Result, anyhow};
use balloon::units::Bytes;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::history::{Guest, GuestSample, History};

const SIZE: (u32, u32) = (1000, 1000);
const USED: RGBColor = RGBColor(0x2f, 0x6d, 0xb5);
const HAS: RGBColor = RGBColor(0x10, 0x10, 0x10);
const TARGET: RGBColor = RGBColor(0xe0, 0x7b, 0x00);
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

/// A curve of one guest; it has gaps where the guest did not answer.
fn curve(history: &History, number: usize, part: impl Fn(&GuestSample) -> Option<Bytes>) -> Vec<(f64, f64)> {
    let points = history.samples.iter().filter_map(|sample| {
        let value = part(sample.guests[number].as_ref()?)?;
        Some((sample.time.as_secs_f64(), mib(value)))
    });
    points.collect()
}

fn draw_guest(history: &History, number: usize, guest: &Guest, area: &Area<'_>) -> Result<()> {
    let title = format!("guest {}: MiB over seconds", guest.name);
    let end = end(history);
    let limits = [(guest.max, "max"), (guest.min, "min")];
    let lines = [
        (curve(history, number, |now| Some(now.actual)), HAS, "has"),
        (curve(history, number, |now| Some(now.target)), TARGET, "target"),
    ];
    let used = curve(history, number, |now| now.used);
    chart(area, &title, end, mib(guest.max) * 1.1, &used, "used", &lines, &limits)
}

fn draw_host(history: &History, area: &Area<'_>) -> Result<()> {
    let sum = |part: fn(&GuestSample) -> Bytes| -> Vec<(f64, f64)> {
        let points = history.samples.iter().map(|sample| (sample.time.as_secs_f64(), mib(sample.sum(part))));
        points.collect()
    };
    let settled = history.settled.unwrap_or_default().as_secs_f64();
    // Until balloons have first inflated, what guests could have is more than the host ever gave.
    let given = sum(|guest| guest.actual).into_iter().filter(|(time, _)| *time >= settled).collect();
    let lines = [(given, HAS, "given to guests")];
    let limits = [(history.budget, "budget")];
    let top = mib(history.budget) * 1.2;
    chart(area, "host: MiB over seconds", end(history), top, &sum(|guest| guest.rss), "held", &lines, &limits)
}

fn end(history: &History) -> f64 {
    history.samples.last().map_or(1.0, |sample| sample.time.as_secs_f64())
}

#[expect(clippy::too_many_arguments, reason = "what is drawn, each part once")]
fn chart(
    area: &Area<'_>,
    title: &str,
    end: f64,
    top: f64,
    filled: &[(f64, f64)],
    filled_name: &str,
    lines: &[(Vec<(f64, f64)>, RGBColor, &str)],
    limits: &[(Bytes, &str)],
) -> Result<()> {
    let wrong = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..end, 0.0..top)
        .map_err(|e| wrong(&e))?;
    chart.configure_mesh().light_line_style(WHITE).draw().map_err(|e| wrong(&e))?;
    chart
        .draw_series(AreaSeries::new(filled.iter().copied(), 0.0, USED.mix(0.35)))
        .map_err(|e| wrong(&e))?
        .label(filled_name)
        .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], USED.mix(0.35).filled()));
    for (points, colour, name) in lines {
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
            .map_err(|e| wrong(&e))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    for (limit, name) in limits {
        let line = [(0.0, mib(*limit)), (end, mib(*limit))];
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
