//! Plots of runs, as SVG.
//!
//! Only SVG is written, since drawing pixels would bring fonts and image formats along.

mod confidence;
mod training;

use std::ops::Range;
use std::path::{Path, PathBuf};

use buzzer::eval::Interval;
use plotters::chart::{ChartBuilder, ChartContext, SeriesLabelPosition};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::{Circle, ErrorBar, PathElement};
use plotters::prelude::{Cartesian2d, DrawingArea, IntoDrawingArea, SVGBackend};
use plotters::series::LineSeries;
use plotters::style::{BLACK, Color, RGBAColor, RGBColor, WHITE};

use crate::{Failure, write_bytes};

pub use confidence::plot_confidence;
pub use training::plot_training;

/// Width and height of two plots side by side, in pixels.
const SIZE: (u32, u32) = (1000, 460);
/// Labels of an axis at most, unless there are fewer values.
const LABELS: usize = 11;
const GREY: RGBColor = RGBColor(150, 150, 150);

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// What goes wrong when drawing, as text: plotters' own errors borrow the drawing.
type Drawn = Result<(), String>;

/// An axis: its description, its range, how many labels it has at most, and their digits behind the point.
struct Axis {
    name: &'static str,
    range: Range<f64>,
    labels: usize,
    digits: usize,
}

impl Axis {
    fn percent(name: &'static str) -> Self {
        Self { name, range: 0.0..100.0, labels: LABELS, digits: 0 }
    }
}

/// A point with an interval of its height.
struct Point {
    x: f64,
    y: f64,
    low: f64,
    high: f64,
}

impl Point {
    /// A share and its interval, in percent.
    fn percent(x: f64, share: f64, Interval { low, high }: Interval) -> Self {
        Self { x, y: 100.0 * share, low: 100.0 * low, high: 100.0 * high }
    }
}

/// Draws two panels side by side into a file of a folder.
fn write_plot(
    dir: &Path,
    file: &str,
    draw: impl FnOnce(&Panel<'_>, &Panel<'_>) -> Drawn,
) -> Result<PathBuf, Failure> {
    let path = dir.join(file);
    let mut svg = String::new();
    draw_panels(&mut svg, draw).map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    write_bytes(&path, svg.as_bytes())?;
    Ok(path)
}

fn draw_panels(svg: &mut String, draw: impl FnOnce(&Panel<'_>, &Panel<'_>) -> Drawn) -> Drawn {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|error| error.to_string())?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    draw(&left, &right)?;
    root.present().map_err(|error| error.to_string())
}

/// A panel with title and axes, and nothing in it.
fn chart<'a, 'b>(area: &Panel<'b>, title: &str, [x, y]: [&Axis; 2]) -> Result<Chart<'a, 'b>, String> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(26)
        .x_label_area_size(42)
        .y_label_area_size(52)
        .build_cartesian_2d(x.range.clone(), y.range.clone())
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .x_labels(x.labels)
        .y_labels(y.labels)
        .x_desc(x.name)
        .y_desc(y.name)
        .x_label_formatter(&|value| format!("{value:.*}", x.digits))
        .y_label_formatter(&|value| format!("{value:.*}", y.digits))
        .label_style(("sans-serif", 13))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.1))
        .draw()
        .map_err(|error| error.to_string())?;
    Ok(chart)
}

/// A line through points, and its entry in the legend.
fn line(chart: &mut Chart<'_, '_>, points: Vec<(f64, f64)>, color: RGBAColor, label: Option<&str>) -> Drawn {
    let series = chart.draw_series(LineSeries::new(points, color)).map_err(|error| error.to_string())?;
    if let Some(label) = label {
        series
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    Ok(())
}

/// Points with bars for their intervals.
fn dots(chart: &mut Chart<'_, '_>, points: &[Point], color: RGBColor) -> Drawn {
    let bar =
        |point: &Point| ErrorBar::new_vertical(point.x, point.low, point.y, point.high, color.mix(0.5), 6);
    chart.draw_series(points.iter().map(bar)).map_err(|error| error.to_string())?;
    let dot = |point: &Point| Circle::new((point.x, point.y), 3, color.filled());
    chart.draw_series(points.iter().map(dot)).map_err(|error| error.to_string())?;
    Ok(())
}

/// The legend of what has been drawn with labels.
fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, position: SeriesLabelPosition) -> Drawn {
    let mut labels = chart.configure_series_labels();
    labels
        .position(position)
        .background_style(WHITE.mix(0.8))
        .border_style(GREY)
        .label_font(("sans-serif", 13));
    labels.draw().map_err(|error| error.to_string())
}
