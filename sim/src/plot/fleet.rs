//! A cluster's day.

use plotters::prelude::*;

use super::{Area, Drawn, FAINT, GRID, INK, OURS, PlotError, bold, font, picture};
use crate::fleet::day::{Minute, Outcome};
use crate::fleet::{Counting, Setup};

const fn colour(counting: Counting) -> RGBColor {
    match counting {
        Counting::Sizes => RGBColor(0x6b, 0x72, 0x80),
        Counting::Floors => RGBColor(0x1f, 0x6f, 0xb5),
        Counting::Pressure => OURS,
    }
}

/// Draws how many VMs run over a day, and how many are on hosts that are short, by each way to count, as SVG.
///
/// # Errors
/// [`PlotError`] where there is nothing to be drawn of it.
pub fn fleet(setup: &Setup, outcomes: &[Outcome]) -> Result<String, PlotError> {
    picture((1200, 560), |root| {
        root.fill(&WHITE)?;
        root.draw_text("How many VMs fit on a cluster?", &bold(26.0, &INK), (36, 24))?;
        let line = format!(
            "{} hosts with {} for VMs each; {} VMs want to run; {} hosts are lost.",
            setup.hosts, setup.budget, setup.vms, setup.losses
        );
        root.draw_text(&line, &font(15.0, &FAINT), (36, 60))?;
        for (row, outcome) in (0..).zip(outcomes) {
            let colour = colour(outcome.counting);
            let text = format!("counted by {}", outcome.counting);
            root.draw_text(&text, &bold(14.0, &colour), (700 + 160 * row, 62))?;
        }
        let (left, right) = root.margin(92, 24, 28, 28).split_horizontally(570);
        draw(&left, setup, outcomes, "VMs that run", |minute| minute.running)?;
        draw(&right, setup, outcomes, "VMs on hosts whose guests use more than there is", |minute| {
            minute.short
        })
    })
}

fn draw(
    area: &Area,
    setup: &Setup,
    outcomes: &[Outcome],
    title: &str,
    value: impl Fn(&Minute) -> usize,
) -> Drawn {
    let hours = (setup.minutes as f64 / 60.0).max(0.1);
    let top = outcomes.iter().flat_map(|outcome| &outcome.minutes).map(&value).max().unwrap_or(0);
    let mut chart = ChartBuilder::on(&area.margin(8, 8, 8, 16))
        .caption(title, bold(15.0, &INK))
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(0.0..hours, 0.0..(top as f64 * 1.05).max(1.0))?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(WHITE)
        .axis_style(FAINT)
        .label_style(font(13.0, &INK))
        .axis_desc_style(font(13.0, &FAINT))
        .x_desc("hours")
        .x_label_formatter(&|hour| format!("{hour:.0}"))
        .y_label_formatter(&|vms| format!("{vms:.0}"))
        .draw()?;
    for outcome in outcomes {
        let points =
            (0u32..).zip(&outcome.minutes).map(|(at, minute)| (f64::from(at) / 60.0, value(minute) as f64));
        chart.draw_series(LineSeries::new(points, colour(outcome.counting).stroke_width(2)))?;
    }
    Ok(())
}
