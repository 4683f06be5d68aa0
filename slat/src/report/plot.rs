//! Plots as SVG text, sized to be read on a phone.

use plotters::prelude::*;

const SIZE: (u32, u32) = (560, 380);
const FONT: &str = "sans-serif";
/// With SLAT, or in a guest.
pub const ON: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
/// Without SLAT, or natively.
pub const OFF: RGBColor = RGBColor(0xd9, 0x6b, 0x27);
/// A third setting between the two.
pub const THIRD: RGBColor = RGBColor(0x4d, 0x8f, 0x4a);
const INK: RGBColor = RGBColor(0x22, 0x2b, 0x33);
const FAINT: RGBColor = RGBColor(0xdd, 0xe2, 0xe6);

/// A line of a plot.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name in the legend.
    pub name: &'static str,
    /// Its colour.
    pub colour: RGBColor,
    /// Its points: x above zero.
    pub points: Vec<(f64, f64)>,
}

/// Lines over a doubling x axis; nothing where no line has two points.
pub fn lines(x: &str, y: &str, lines: &[Line]) -> Option<String> {
    let points = || lines.iter().flat_map(|l| l.points.iter());
    if lines.iter().all(|l| l.points.len() < 2) || points().any(|p| p.0 <= 0.0) {
        return None;
    }
    let left = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let right = points().map(|p| p.0).fold(0.0, f64::max);
    let top = points().map(|p| p.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    draw(|root| {
        let mut chart = ChartBuilder::on(root)
            .margin(12)
            .margin_right(28)
            .x_label_area_size(52)
            .y_label_area_size(72)
            .build_cartesian_2d((left..right).log_scale().base(2.0), 0.0..top * 1.1)?;
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .axis_style(INK)
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .label_style((FONT, 19).into_font().color(&INK))
            .axis_desc_style((FONT, 20).into_font().color(&INK))
            .x_label_formatter(&whole)
            .y_label_formatter(&|v| crate::figure::short(*v))
            .y_labels(6)
            .draw()?;
        for line in lines {
            let style = line.colour.stroke_width(3);
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), style))?
                .label(line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
            chart.draw_series(line.points.iter().map(|p| Circle::new(*p, 4, line.colour.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font((FONT, 19).into_font().color(&INK))
            .background_style(WHITE.mix(0.85))
            .draw()
    })
}

/// Whole numbers alone: between two of them there is nothing on these axes.
fn whole(value: &f64) -> String {
    if (value - value.round()).abs() < 0.01 { crate::figure::short(value.round()) } else { String::new() }
}

/// A pair of bars for each name: SLAT on above, off below, with the numbers written out.
pub fn bars(rows: &[(String, f64, f64)]) -> Option<String> {
    let top = rows.iter().map(|r| r.1.max(r.2)).fold(0.0, f64::max);
    if rows.is_empty() || top <= 0.0 {
        return None;
    }
    let (left, right, row) = (160, 470, (SIZE.1 as i32 - 40) / rows.len() as i32);
    let x = |value: f64| left + (f64::from(right - left) * value / top) as i32;
    draw(|root| {
        let text = (FONT, 19).into_font().color(&INK);
        for (place, (name, colour)) in [(left, ("SLAT on", ON)), (left + 130, ("SLAT off", OFF))] {
            root.draw(&Rectangle::new([(place, 10), (place + 14, 24)], colour.filled()))?;
            root.draw(&Text::new(name, (place + 20, 8), text.clone()))?;
        }
        for (number, (name, on, off)) in (0..).zip(rows) {
            let y = 36 + number * row;
            let half = (row - 8) / 2;
            root.draw(&Text::new(name.clone(), (8, y + half - 8), text.clone()))?;
            for (y, value, colour) in [(y, *on, ON), (y + half, *off, OFF)] {
                root.draw(&Rectangle::new(
                    [(left, y), (x(value).max(left + 1), y + half - 2)],
                    colour.filled(),
                ))?;
                let label = crate::figure::short(value);
                root.draw(&Text::new(label, (x(value) + 8, y + half / 2 - 9), text.clone()))?;
            }
        }
        Ok(())
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

/// Plots are decoration of figures that the tables hold too: one that can't be drawn is left out.
fn draw(what: impl for<'a> FnOnce(&Area<'a>) -> Drawn<'a>) -> Option<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        // Readers may see the plot alone, on any ground.
        root.fill(&WHITE).ok()?;
        what(&root).ok()?;
        root.present().ok()?;
    }
    Some(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_hold_their_words_and_numbers() {
        let rows = [("invlpg".to_owned(), 0.0, 1.0), ("mmap-batch".to_owned(), 0.0, 2.006)];
        let svg = bars(&rows).expect("bars");
        for word in ["invlpg", "mmap-batch", "2.006", "SLAT off"] {
            assert!(svg.contains(word), "{word}");
        }
        assert!(bars(&[]).is_none());
        let line = |points| Line { name: "native", colour: ON, points };
        assert!(lines("MiB", "ns", &[line(vec![(2.0, 1.0)])]).is_none());
        assert!(lines("MiB", "ns", &[line(vec![(0.0, 1.0), (1.0, 1.0)])]).is_none());
        let svg = lines("MiB", "ns", &[line(vec![(2.0, 1.0), (1024.0, 90.0)])]).expect("lines");
        assert!(svg.contains("native") && svg.contains("<svg"));
        assert_eq!((whole(&2.0), whole(&2.5)), ("2".into(), String::new()));
    }
}
