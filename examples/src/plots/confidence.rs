//! `confidence.svg`: what a run's confidence is worth, as two plots side by side.
//!
//! Left, the share of right answers over their confidence: on the diagonal a model is right as often as it says. Right,
//! precision over the share of clues answered, the surest first. Bars are 95 % intervals.

use std::path::{Path, PathBuf};

use buzzer::eval::{Bin, Calibration, PrecisionCurve};
use plotters::style::BLUE;

use super::{Axis, Drawn, GREY, Panel, Point, chart, dots, line, write_plot};
use crate::Failure;

const FILE: &str = "confidence.svg";

/// Draws a run's calibration and precision into its folder.
///
/// # Errors
/// If the file cannot be written.
pub fn plot_confidence(
    dir: &Path,
    calibration: &Calibration,
    precision: &PrecisionCurve,
) -> Result<PathBuf, Failure> {
    write_plot(dir, FILE, |left, right| draw(left, right, calibration, precision))
}

fn draw(left: &Panel<'_>, right: &Panel<'_>, calibration: &Calibration, precision: &PrecisionCurve) -> Drawn {
    let point = |bin: &Bin| Point::percent(100.0 * bin.confidence, bin.accuracy, bin.accuracy_interval);
    let bins: Vec<Point> = calibration.bins.iter().filter(|bin| bin.n > 0).map(point).collect();
    let title = format!("calibration error {:.1} %", 100.0 * calibration.ece);
    panel(left, &title, ["confidence, %", "right, %"], &bins, true)?;
    let points: Vec<Point> = precision
        .points
        .iter()
        .map(|point| Point::percent(100.0 * point.share, point.precision, point.precision_interval))
        .collect();
    let at_70 = precision.at_70.map_or(0.0, |at| at.precision);
    let title = format!("precision {:.1} % at 70 % answered", 100.0 * at_70);
    panel(right, &title, ["clues answered, %", "right of those, %"], &points, false)
}

fn panel(area: &Panel<'_>, title: &str, axes: [&'static str; 2], points: &[Point], diagonal: bool) -> Drawn {
    let [x, y] = axes.map(Axis::percent);
    let mut chart = chart(area, title, [&x, &y])?;
    if diagonal {
        line(&mut chart, vec![(0.0, 0.0), (100.0, 100.0)], GREY.into(), None)?;
    }
    line(&mut chart, points.iter().map(|point| (point.x, point.y)).collect(), BLUE.into(), None)?;
    dots(&mut chart, points, BLUE)
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
