//! An assessment as text: one line for each thing said of a run, and tables of groups.
//!
//! Every share stands with its 95 % interval. It trades completeness for a screen: long tables are cut after a few rows,
//! and say how many more stand in the report.

use std::fmt::Write;

use buzzer::eval::{
    Assessment, Calibration, Comparison, Group, Interval, LeakReport, Precision, PrecisionCurve,
};

use crate::predictions::Compared;

/// Rows of a table at most.
const ROWS: usize = 15;

/// The lines for a run; no line end after the last.
#[must_use]
pub fn describe_assessment(assessed: &Assessment, worst_least: usize) -> String {
    let mut out = String::new();
    let Assessment { all, triviaqa, answers, keys, by, worst_categories, .. } = assessed;
    let _ = writeln!(out, "result    {} on {} clues", scores(all), all.n);
    let _ = writeln!(
        out,
        "triviaqa  exact match {:.1} %, F1 {:.1} %, with the key as the only reference and no phrasing taken off",
        100.0 * triviaqa.exact_match,
        100.0 * triviaqa.f1
    );
    let _ = writeln!(
        out,
        "phrasing  {:.1} % in the show's form, {:.1} % empty; median {} words (keys: {})",
        100.0 * answers.show_form,
        100.0 * answers.empty,
        answers.median_words,
        keys.median_words
    );
    if let Some(leaks) = &assessed.leaks {
        out += &leak_lines(leaks);
    }
    if let (Some(calibration), Some(precision)) = (&assessed.calibration, &assessed.precision) {
        out += &confidence_lines(calibration, precision);
    }
    for (facet, groups) in by {
        out += &table(&format!("by {facet}"), groups);
    }
    if !worst_categories.is_empty() {
        out += &table(&format!("worst categories of {worst_least} clues or more"), worst_categories);
    }
    out.truncate(out.trim_end().len());
    out
}

/// The line for a comparison.
#[must_use]
pub fn describe_comparison(compared: &Compared) -> String {
    let Comparison { n, only_first, only_second, .. } = compared.comparison;
    let Comparison { exact_match_difference, exact_match_interval, exact_match_p, .. } = compared.comparison;
    let Comparison { f1_difference, f1_interval, f1_p, .. } = compared.comparison;
    let mut out = format!(
        "compared  with {} on {n} clues: exact match {:+.1} points {}, {} ({only_first} right here \
         only, {only_second} there only); F1 {:+.1} points {}, {}",
        compared.with.display(),
        100.0 * exact_match_difference,
        percent(exact_match_interval),
        p_value(exact_match_p),
        100.0 * f1_difference,
        percent(f1_interval),
        p_value(f1_p)
    );
    if compared.only_here + compared.only_there > 0 {
        let _ = write!(
            out,
            "; left out: {} clues of this run, {} of the other",
            compared.only_here, compared.only_there
        );
    }
    out
}

fn p_value(p: f64) -> String {
    if p < 0.0001 { "p < 0.0001".to_owned() } else { format!("p = {p:.4}") }
}

fn scores(group: &Group) -> String {
    let Group { exact_match, exact_match_interval, f1, f1_interval, .. } = group;
    format!(
        "exact match {:.1} % {}, F1 {:.1} % {}",
        100.0 * exact_match,
        percent(*exact_match_interval),
        100.0 * f1,
        percent(*f1_interval)
    )
}

fn percent(interval: Interval) -> String {
    format!("[{:.1}, {:.1}]", 100.0 * interval.low, 100.0 * interval.high)
}

fn leak_lines(leaks: &LeakReport) -> String {
    let LeakReport { exact, near, leaked, without_exact, without_any } = leaks;
    let mut out =
        format!("leaks     {exact} clues stand in the training clues word for word, {near} nearly\n");
    let counted = [(leaked, *exact + *near > 0), (without_exact, *exact > 0), (without_any, *near > 0)];
    for (group, _) in counted.into_iter().filter(|(_, differs)| *differs) {
        let _ = writeln!(out, "          {}: {} on {} clues", group.name, scores(group), group.n);
    }
    out
}

fn confidence_lines(calibration: &Calibration, precision: &PrecisionCurve) -> String {
    let Calibration { ece, brier, confidence, accuracy, .. } = calibration;
    let mut out = format!(
        "confident expected calibration error {:.1} %, Brier score {brier:.3}; mean confidence {:.1} %, right {:.1} %\n",
        100.0 * ece,
        100.0 * confidence,
        100.0 * accuracy
    );
    if let Some(Precision { precision, precision_interval, threshold, .. }) = precision.at_70 {
        let _ = writeln!(
            out,
            "precision {:.1} % {} on the 70 % of clues answered with most confidence ({:.1} % or more)",
            100.0 * precision,
            percent(precision_interval),
            100.0 * threshold
        );
    }
    let _ = writeln!(out, "  confidence        n   mean   right");
    for bin in calibration.bins.iter().filter(|bin| bin.n > 0) {
        let _ = writeln!(
            out,
            "  {:>3.0} to {:>3.0} %  {:>6}  {:>5.1}  {:>6.1} {}",
            100.0 * bin.from,
            100.0 * bin.to,
            bin.n,
            100.0 * bin.confidence,
            100.0 * bin.accuracy,
            percent(bin.accuracy_interval)
        );
    }
    out
}

fn table(title: &str, groups: &[Group]) -> String {
    let shown = &groups[..groups.len().min(ROWS)];
    let width = shown.iter().map(|group| group.name.chars().count()).max().unwrap_or(0).clamp(8, 40);
    let mut out = format!("{title}\n  {:width$}  {:>6}  exact match           F1\n", "", "n");
    for group in shown {
        let name: String = group.name.chars().take(width).collect();
        let _ = writeln!(
            out,
            "  {name:width$}  {:>6}  {:>5.1} {:14}  {:>5.1} {}",
            group.n,
            100.0 * group.exact_match,
            percent(group.exact_match_interval),
            100.0 * group.f1,
            percent(group.f1_interval)
        );
    }
    if groups.len() > shown.len() {
        let _ = writeln!(out, "  and {} more, all of them in report.json", groups.len() - shown.len());
    }
    out
}
