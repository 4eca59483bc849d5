//! Scores by group: category, round, dollar value, decade and type of answer.
//!
//! Every clue is in one group of each facet, so the groups' sizes add up to the clues. What it trades: values that are no
//! standard amount of the board are wagers on a Daily Double and stand together. It refuses to rank groups by luck alone:
//! the worst are chosen only among those of a least size, and every group has its intervals.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::AnswerType;
use crate::interval::{Interval, bootstrap_mean, wilson};
use crate::paired::Mark;

/// The amounts on the board, before and since November 2001.
const BOARD: [u32; 11] = [100, 200, 300, 400, 500, 600, 800, 1000, 1200, 1600, 2000];

/// By what clues are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Facet {
    /// The round as the file writes it, in the order of the show.
    Round,
    /// The amount on the board.
    Value,
    /// The decade of the air date.
    Decade,
    /// [`AnswerType`].
    AnswerType,
    /// The category as the file writes it.
    Category,
}

impl Facet {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 5] = [Self::Round, Self::Value, Self::Decade, Self::AnswerType, Self::Category];

    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Round => "round",
            Self::Value => "value",
            Self::Decade => "decade",
            Self::AnswerType => "answer_type",
            Self::Category => "category",
        }
    }
}

impl fmt::Display for Facet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no facet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownFacet(String);

impl fmt::Display for UnknownFacet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is nothing to group by; choose round, value, decade, answer_type or category", self.0)
    }
}

impl std::error::Error for UnknownFacet {}

impl FromStr for Facet {
    type Err = UnknownFacet;

    fn from_str(text: &str) -> Result<Self, UnknownFacet> {
        let wanted = text.trim().to_lowercase().replace('-', "_");
        let found = Self::ALL.into_iter().find(|facet| facet.name() == wanted);
        found.ok_or_else(|| UnknownFacet(text.to_owned()))
    }
}

/// What is known of a clue before it is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts<'a> {
    /// Its text.
    pub question: &'a str,
    /// Its key.
    pub gold: &'a str,
    /// Its category; may be empty.
    pub category: &'a str,
    /// Its round.
    pub round: Option<&'a str>,
    /// Its value as the file writes it.
    pub value: Option<&'a str>,
    /// The year it was aired.
    pub year: Option<u16>,
}

/// A group's name, and its place among the groups of its facet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Label {
    rank: u32,
    name: String,
}

/// The rank of what has no group of its own; it comes last.
const LAST: u32 = u32::MAX;

fn label(facet: Facet, facts: &Facts<'_>) -> Label {
    let last = |name: &str| Label { rank: LAST, name: name.to_owned() };
    match facet {
        Facet::Category if facts.category.is_empty() => last("no category"),
        Facet::Category => Label { rank: 0, name: facts.category.to_owned() },
        Facet::Round => facts.round.map_or_else(|| last("no round"), round_label),
        Facet::Value => facts.value.map_or_else(|| last("no value"), value_label),
        Facet::Decade => facts.year.map_or_else(
            || last("no date"),
            |year| Label { rank: u32::from(year / 10), name: format!("{}0s", year / 10) },
        ),
        Facet::AnswerType => {
            let kind = AnswerType::of(facts.question, facts.gold);
            Label { rank: kind as u32, name: kind.name().to_owned() }
        }
    }
}

fn round_label(round: &str) -> Label {
    let known = ["jeopardy", "double jeopardy", "final jeopardy", "tiebreaker"];
    let plain = round.to_lowercase().replace('!', "");
    let rank = known.iter().position(|known| *known == plain.trim()).unwrap_or(known.len());
    Label { rank: rank as u32, name: round.to_owned() }
}

/// "$2,000", "$200 " and "2000" are amounts; "None" is none; others are wagers.
fn value_label(value: &str) -> Label {
    let digits: String = value.chars().filter(|c| !matches!(c, '$' | ',' | ' ')).collect();
    match digits.parse::<u32>() {
        Ok(amount) if BOARD.contains(&amount) => Label { rank: amount, name: format!("${amount}") },
        Ok(_) => Label { rank: LAST - 1, name: "wager".to_owned() },
        Err(_) => Label { rank: LAST, name: "no value".to_owned() },
    }
}

/// Scores of some clues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// What they have in common.
    pub name: String,
    /// Clues.
    pub n: usize,
    /// Share of exact matches.
    pub exact_match: f64,
    /// Its interval, Wilson's.
    pub exact_match_interval: Interval,
    /// Mean F1.
    pub f1: f64,
    /// Its interval, by the bootstrap.
    pub f1_interval: Interval,
}

impl Group {
    /// The scores of clues with these marks.
    #[must_use]
    pub fn of(name: impl Into<String>, marks: &[Mark]) -> Self {
        let n = marks.len();
        let hits = marks.iter().filter(|mark| mark.exact_match).count();
        let f1: Vec<f64> = marks.iter().map(|mark| mark.f1).collect();
        let count = n.max(1) as f64;
        Self {
            name: name.into(),
            n,
            exact_match: hits as f64 / count,
            exact_match_interval: wilson(hits, n),
            f1: f1.iter().sum::<f64>() / count,
            f1_interval: bootstrap_mean(&f1),
        }
    }
}

/// The groups of a facet: rounds, values, decades and types in their natural order, categories by size and name.
#[must_use]
pub fn breakdown(facet: Facet, clues: &[(Facts<'_>, Mark)]) -> Vec<Group> {
    let mut marks: HashMap<Label, Vec<Mark>> = HashMap::new();
    for (facts, mark) in clues {
        marks.entry(label(facet, facts)).or_default().push(*mark);
    }
    let mut groups: Vec<(Label, Vec<Mark>)> = marks.into_iter().collect();
    groups.sort_unstable_by(|(a, of_a), (b, of_b)| {
        let size = |of: &Vec<Mark>| Reverse(if facet == Facet::Category { of.len() } else { 0 });
        (a.rank, size(of_a), &a.name).cmp(&(b.rank, size(of_b), &b.name))
    });
    groups.into_iter().map(|(label, marks)| Group::of(label.name, &marks)).collect()
}

/// The groups of at least `least` clues with the lowest share of exact matches, then the lowest F1, at most `count`.
#[must_use]
pub fn worst(groups: &[Group], least: usize, count: usize) -> Vec<Group> {
    let mut large: Vec<&Group> = groups.iter().filter(|group| group.n >= least).collect();
    large.sort_by(|a, b| a.exact_match.total_cmp(&b.exact_match).then(a.f1.total_cmp(&b.f1)));
    large.into_iter().take(count).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(f1: f64) -> Mark {
        Mark { exact_match: f1 == 1.0, f1 }
    }

    fn names(groups: &[Group]) -> Vec<(&str, usize)> {
        groups.iter().map(|group| (group.name.as_str(), group.n)).collect()
    }

    #[test]
    fn values_are_read_however_they_are_written() {
        let facts = |value| Facts { value, ..Facts::default() };
        let clues: Vec<(Facts<'_>, Mark)> = [
            Some("$2,000"),
            Some("$200"),
            Some("$200 "),
            Some("2000"),
            Some("$3,700"),
            Some("None"),
            None,
            Some("$1000"),
        ]
        .into_iter()
        .map(|value| (facts(value), mark(1.0)))
        .collect();
        let groups = breakdown(Facet::Value, &clues);
        assert_eq!(names(&groups), [("$200", 2), ("$1000", 1), ("$2000", 2), ("wager", 1), ("no value", 2)]);
    }

    #[test]
    fn rounds_decades_and_types_keep_their_order() {
        let clue = |round, year, gold| (Facts { round, year, gold, ..Facts::default() }, mark(0.0));
        let clues = [
            clue(Some("Final Jeopardy!"), Some(2001), "tin"),
            clue(Some("Jeopardy!"), Some(1999), "1905"),
            clue(Some("Double Jeopardy!"), Some(1990), "Ann"),
            clue(Some("Bonus"), None, "tin"),
            clue(None, Some(2009), "12"),
        ];
        let by = |facet| breakdown(facet, &clues);
        let rounds = [
            ("Jeopardy!", 1),
            ("Double Jeopardy!", 1),
            ("Final Jeopardy!", 1),
            ("Bonus", 1),
            ("no round", 1),
        ];
        assert_eq!(names(&by(Facet::Round)), rounds);
        assert_eq!(names(&by(Facet::Decade)), [("1990s", 2), ("2000s", 2), ("no date", 1)]);
        assert_eq!(names(&by(Facet::AnswerType)), [("date", 1), ("number", 1), ("name", 1), ("thing", 2)]);
    }

    #[test]
    fn groups_hold_their_clues_scores_and_the_worst_are_large_enough() {
        let clue = |category, f1| (Facts { category, ..Facts::default() }, mark(f1));
        let mut clues = vec![clue("RIVERS", 1.0), clue("RIVERS", 0.5), clue("RIVERS", 0.0), clue("", 0.0)];
        clues.extend([clue("METALS", 0.0), clue("METALS", 0.25), clue("INNS", 0.0), clue("ISLES", 1.0)]);
        clues.extend([clue("ISLES", 1.0), clue("ISLES", 1.0)]);
        let groups = breakdown(Facet::Category, &clues);
        let expected = [("ISLES", 3), ("RIVERS", 3), ("METALS", 2), ("INNS", 1), ("no category", 1)];
        assert_eq!(names(&groups), expected);
        let rivers = &groups[1];
        assert!((rivers.exact_match - 1.0 / 3.0).abs() < 1e-12 && (rivers.f1 - 0.5).abs() < 1e-12);
        assert_eq!(rivers.exact_match_interval, wilson(1, 3));
        assert_eq!(rivers.f1_interval, bootstrap_mean(&[1.0, 0.5, 0.0]));
        assert_eq!(names(&worst(&groups, 2, 2)), [("METALS", 2), ("RIVERS", 3)]);
        assert!(worst(&groups, 9, 2).is_empty());
    }

    #[test]
    fn facets_are_read_by_name() {
        for facet in Facet::ALL {
            assert_eq!(facet.name().parse(), Ok(facet));
            assert_eq!(serde_json::to_value(facet).unwrap(), facet.name());
        }
        assert_eq!("Answer-Type".parse(), Ok(Facet::AnswerType));
        assert!("colour".parse::<Facet>().unwrap_err().to_string().contains("`colour`"));
    }
}
