//! `confidence.svg`: what a run's confidence is worth, as two plots side by side.
//!
//! Left, the share of right answers over their confidence: on the diagonal a model is right as often as it says. Right,
//! precision over the share of clues answered, the surest first. Bars are 95 % intervals. Only SVG is written, since
//! drawing pixels would bring fonts and image formats along.

use std::path::{Path, PathBuf};

use buzzer::eval::{Bin, Calibration, Interval, PrecisionCurve};
use buzzer::weights::{WeightsError, write_atomic};
use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::{Circle, ErrorBar};
use plotters::prelude::{Cartesian2d, DrawingArea, IntoDrawingArea, SVGBackend};
use plotters::series::LineSeries;
use plotters::style::{BLACK, BLUE, Color, RGBColor, WHITE};

use crate::Failure;

const FILE: &str = "confidence.svg";
/// Width and height of both plots together, in pixels.
const SIZE: (u32, u32) = (1000, 460);
const GREY: RGBColor = RGBColor(150, 150, 150);

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A point with an interval, all in percent.
struct Point {
    x: f64,
    y: f64,
    low: f64,
    high: f64,
}

impl Point {
    fn new(x: f64, y: f64, Interval { low, high }: Interval) -> Self {
        Self { x: 100.0 * x, y: 100.0 * y, low: 100.0 * low, high: 100.0 * high }
    }
}

/// Draws a run's calibration and precision into its folder.
///
/// # Errors
/// If the file cannot be written.
pub fn plot_confidence(
    dir: &Path,
    calibration: &Calibration,
    precision: &PrecisionCurve,
) -> Result<PathBuf, Failure> {
    let path = dir.join(FILE);
    let mut svg = String::new();
    draw(&mut svg, calibration, precision)
        .map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    write_atomic(&path, |file| {
        file.write_all(svg.as_bytes()).map_err(|error| WeightsError::write(&path, error))
    })?;
    Ok(path)
}

/// What goes wrong when drawing, as text: plotters' own errors borrow the drawing.
type Drawn = Result<(), String>;

fn draw(svg: &mut String, calibration: &Calibration, precision: &PrecisionCurve) -> Drawn {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|error| error.to_string())?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    let point = |bin: &Bin| Point::new(bin.confidence, bin.accuracy, bin.accuracy_interval);
    let bins: Vec<Point> = calibration.bins.iter().filter(|bin| bin.n > 0).map(point).collect();
    let title = format!("calibration error {:.1} %", 100.0 * calibration.ece);
    panel(&left, &title, ["confidence, %", "right, %"], &bins, true)?;
    let points: Vec<Point> = precision
        .points
        .iter()
        .map(|point| Point::new(point.share, point.precision, point.precision_interval))
        .collect();
    let at_70 = precision.at_70.map_or(0.0, |at| at.precision);
    let title = format!("precision {:.1} % at 70 % answered", 100.0 * at_70);
    panel(&right, &title, ["clues answered, %", "right of those, %"], &points, false)?;
    root.present().map_err(|error| error.to_string())
}

fn panel(area: &Panel<'_>, title: &str, axes: [&str; 2], points: &[Point], diagonal: bool) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(26)
        .x_label_area_size(42)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..100.0, 0.0..100.0)
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .x_desc(axes[0])
        .y_desc(axes[1])
        .x_label_formatter(&|percent| format!("{percent:.0}"))
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .label_style(("sans-serif", 13))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.1))
        .draw()
        .map_err(|error| error.to_string())?;
    if diagonal {
        line(&mut chart, vec![(0.0, 0.0), (100.0, 100.0)], GREY)?;
    }
    line(&mut chart, points.iter().map(|point| (point.x, point.y)).collect(), BLUE)?;
    let bar =
        |point: &Point| ErrorBar::new_vertical(point.x, point.low, point.y, point.high, BLUE.mix(0.5), 6);
    chart.draw_series(points.iter().map(bar)).map_err(|error| error.to_string())?;
    let dot = |point: &Point| Circle::new((point.x, point.y), 3, BLUE.filled());
    chart.draw_series(points.iter().map(dot)).map_err(|error| error.to_string())?;
    Ok(())
}

fn line(chart: &mut Chart<'_, '_>, points: Vec<(f64, f64)>, color: RGBColor) -> Drawn {
    chart.draw_series(LineSeries::new(points, color)).map_err(|error| error.to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use buzzer::eval::{Confident, calibration, precision_curve};

    use super::*;

    #[test]
    fn both_plots_hold_their_points() {
        let answers: Vec<Confident> = (0..50_u32)
            .map(|place| Confident { confidence: f64::from(place) / 50.0, right: place % 3 == 0 })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = plot_confidence(dir.path(), &calibration(&answers), &precision_curve(&answers)).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        // Ten bins and twenty shares; each has a dot, which covers the one that its error bar brings.
        assert_eq!(svg.matches("<circle").count(), 2 * 30);
        assert!(svg.contains("confidence, %") && svg.contains("70 % answered"));
    }
}
