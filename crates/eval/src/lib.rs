//! Judging answers: scores, what they hide, and whether two runs differ.
//!
//! Two judges share one normalisation, the published one of TriviaQA:
//!
//! - [`triviaqa_exact_match`] and [`triviaqa_f1`] are the published script, for numbers that others can compare with;
//! - [`exact_match`], [`f1`] and [`judge`] know the show as well: an answer may come as a question ("What is ...?"), and
//!   a key may hold several answers ("(Thomas) Jefferson", "the sofa (or couch)"). They score as the published script
//!   would with the key's answers as references, the answer's first line taken with and without its phrasing, and the
//!   better of the two counted; but an answer of nothing matches nothing, and what normalises to nothing ("A", "@") is
//!   compared before its articles and marks are gone.
//!
//! The second judge trades strictness for what a host would rule: splitting a key at "or" can accept half of a name
//! that holds the word.
//!
//! [`Assessment`] is all there is to say of one run: scores with intervals, by group ([`breakdown`](breakdown())), phrasing,
//! [`calibration`](calibration()), [`precision_curve`] and what is left without leaked clues ([`find_leaks`]). [`compare`]
//! tests two runs on the same clues. [`ClueStyle`] is for clues that a model wrote, which have no right or wrong.
//!
//! The crate refuses nothing: any two strings have a score, and none is NaN. It reads no file, prints nothing and weighs
//! no spelling: "Filipino" for "Philippine" is wrong.
//!
//! ```
//! use buzzer_eval::{ClueText, LeakOptions, exact_match, find_leaks, judge};
//!
//! assert!(exact_match("Who is Jefferson?", "(Thomas) Jefferson"));
//! let scores = judge([("What is gold?", "gold"), ("tin", "zinc")]);
//! assert_eq!((scores.exact_match, scores.n), (0.5, 2));
//!
//! let held_out = [ClueText { question: "This windy island has one inn", answer: "Borrow" }];
//! let train = [ClueText { question: "There is one inn on this windy island", answer: "Borrow" }];
//! assert!(find_leaks(&held_out, &train, &LeakOptions::default())[0].is_some());
//! ```

mod answer_type;
mod assessment;
mod breakdown;
mod calibration;
mod clue_style;
mod forms;
mod interval;
mod leak;
mod metrics;
mod normalize;
mod paired;
mod random;

pub use answer_type::AnswerType;
pub use assessment::{Answer, AssessOptions, Assessment, LeakReport, Style};
pub use breakdown::{Facet, Facts, Group, UnknownFacet, breakdown, worst};
pub use calibration::{Bin, Calibration, Confident, Precision, PrecisionCurve, calibration, precision_curve};
pub use clue_style::{ClueStyle, KnownClues, Measured, WrittenClue};
pub use forms::{alternatives, in_show_form, strip_show_form};
pub use interval::{Interval, bootstrap_mean, wilson};
pub use leak::{ClueText, Leak, LeakKind, LeakOptions, find_leaks};
pub use metrics::{Scores, exact_match, f1, judge, triviaqa_exact_match, triviaqa_f1, triviaqa_judge};
pub use normalize::normalize;
pub use paired::{Comparison, Mark, compare, sign_test};
