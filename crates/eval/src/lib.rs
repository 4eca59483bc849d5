//! Judging answers: normalisation, exact match and F1.
//!
//! Two judges share one normalisation, the published one of TriviaQA:
//!
//! - [`triviaqa_exact_match`] and [`triviaqa_f1`] are the published script, for numbers that others can compare with;
//! - [`exact_match`], [`f1`] and [`judge`] know the show as well: an answer may come as a question ("What is ...?"), and
//!   a key may hold several answers ("(Thomas) Jefferson", "the sofa (or couch)").
//!
//! The second judge trades strictness for what a host would rule: splitting a key at "or" can accept half of a name
//! that holds the word. It refuses nothing: any two strings have a score, and none is NaN. It reads no file, prints
//! nothing and weighs no spelling: "Filipino" for "Philippine" is wrong.
//!
//! ```
//! use buzzer_eval::{exact_match, judge};
//!
//! assert!(exact_match("Who is Jefferson?", "(Thomas) Jefferson"));
//! let scores = judge([("What is gold?", "gold"), ("tin", "zinc")]);
//! assert_eq!((scores.exact_match, scores.n), (0.5, 2));
//! ```

mod answer_type;
mod breakdown;
mod calibration;
mod forms;
mod interval;
mod leak;
mod metrics;
mod normalize;
mod paired;
mod random;

pub use answer_type::AnswerType;
pub use breakdown::{Facet, Facts, Group, UnknownFacet, breakdown, worst};
pub use calibration::{Bin, Calibration, Confident, Precision, PrecisionCurve, calibration, precision_curve};
pub use forms::{alternatives, strip_show_form};
pub use interval::{Interval, bootstrap_mean, wilson};
pub use leak::{ClueText, Leak, LeakKind, LeakOptions, find_leaks};
pub use metrics::{Scores, exact_match, f1, judge, triviaqa_exact_match, triviaqa_f1, triviaqa_judge};
pub use normalize::normalize;
pub use paired::{Comparison, Mark, compare, sign_test};
