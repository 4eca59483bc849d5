//! What kind of thing an answer is, by rules on the clue and its key.
//!
//! The rules look, in this order, for a date, a number, a title in quotes, what the clue points at ("this river", "this
//! actress", "he"), and a capital letter in the key. They trade depth for being the same everywhere: no model, no list of
//! names, so that "Paris" is a place only where the clue says so, and a name otherwise. They refuse to look at what was
//! answered: a clue's type is the same in every run.

/// Months, as keys spell them in lower case.
const MONTHS: &str = "january february march april may june july august september october november december";

const NUMBER_WORDS: &str = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen \
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred \
    thousand million billion";

/// What "this ..." points at: a person.
const PERSONS: &str = "man woman boy girl person guy lady president king queen emperor empress prince princess pope saint \
    senator governor general admiral leader minister politician dictator author writer novelist poet \
    playwright dramatist journalist actor actress comedian director star singer composer musician rapper \
    dancer artist painter sculptor architect scientist physicist chemist biologist astronomer \
    mathematician philosopher economist inventor explorer astronaut athlete quarterback golfer boxer \
    justice host god goddess prophet hero character designer";

/// What "this ..." points at: a place.
const PLACES: &str = "city town village capital country nation republic kingdom state province county territory colony \
    continent island islands peninsula region river lake sea ocean bay gulf strait canal mountain \
    mountains range peak volcano desert valley park street avenue port university college museum castle \
    planet";

/// What "this ..." points at: a work.
const WORKS: &str = "film movie flick novel book play story poem epic drama tragedy comedy musical opera ballet symphony \
    song tune hit hymn anthem album show series sitcom magazine newspaper painting sculpture title";

/// Words between "this" and what it names, at most.
const POINTER_REACH: usize = 5;

/// A kind of answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AnswerType {
    /// A year, a day, a month, a decade or a century.
    Date,
    /// A number, an amount, a percentage.
    Number,
    /// The title of a work: in quotes, or pointed at as one.
    Work,
    /// Pointed at as a person.
    Person,
    /// Pointed at as a place.
    Place,
    /// Another name: a word of the key has a capital letter.
    Name,
    /// Anything else.
    Thing,
}

impl AnswerType {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Date => "date",
            Self::Number => "number",
            Self::Work => "work",
            Self::Person => "person",
            Self::Place => "place",
            Self::Name => "name",
            Self::Thing => "thing",
        }
    }

    /// The type of a clue's answer, from the clue's text and its key.
    #[must_use]
    pub fn of(question: &str, gold: &str) -> Self {
        let gold = gold.trim();
        let words = lower_words(gold);
        let meat: Vec<&str> = words.iter().map(String::as_str).filter(|word| !is_filler(word)).collect();
        if is_date(gold, &meat) {
            return Self::Date;
        }
        if is_number(&meat) {
            return Self::Number;
        }
        if gold.len() > 2 && gold.starts_with(['"', '“']) && gold.ends_with(['"', '”']) {
            return Self::Work;
        }
        let form = if has_name(gold) { Self::Name } else { Self::Thing };
        pointed_at(question).unwrap_or(form)
    }
}

fn lower_words(text: &str) -> Vec<String> {
    let parted = |c: char| !(c.is_alphanumeric() || matches!(c, '\'' | '’' | '.' | ',' | '%' | '$'));
    let trim = |word: &str| word.trim_matches(['.', ',', '\'', '’']).to_lowercase();
    text.split(parted).map(trim).filter(|word| !word.is_empty()).collect()
}

fn is_filler(word: &str) -> bool {
    matches!(word, "the" | "a" | "an" | "in" | "of" | "about" | "and" | "or" | "b.c" | "bc" | "a.d" | "ad")
}

/// A year alone (1000 to 2999, or any with an era), a decade, a century, a month, or a month with a day or year.
fn is_date(gold: &str, words: &[&str]) -> bool {
    let digits = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    let is_year = |word: &str| digits(word) && word.len() == 4 && matches!(&word[..1], "1" | "2");
    let is_decade = |word: &str| word.strip_suffix("'s").or(word.strip_suffix('s')).is_some_and(digits);
    let in_date = |word: &&str| among(MONTHS, word) || is_day(word) || is_year(word);
    let lower = gold.to_lowercase();
    let era = ["b.c.", " bc", "a.d. ", "ad "].iter().any(|era| lower.contains(era));
    match words {
        [] => false,
        [word] if is_year(word) || is_decade(word) || among(MONTHS, word) => true,
        [number] if digits(number) => era,
        [.., "century"] => true,
        _ => words.iter().any(|word| among(MONTHS, word)) && words.iter().all(in_date),
    }
}

/// "4", "4th".
fn is_day(word: &str) -> bool {
    let number = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let ending = &word[number.len()..];
    matches!(ending, "" | "st" | "nd" | "rd" | "th")
        && number.parse().is_ok_and(|day: u8| (1..=31).contains(&day))
}

/// Begins with a figure or with a number word, and has no word beside numbers and one unit.
fn is_number(words: &[&str]) -> bool {
    let is_figure =
        |word: &str| word.chars().any(|c| c.is_ascii_digit()) && !word.chars().any(char::is_alphabetic);
    let numeric = |word: &&&str| is_figure(word) || among(NUMBER_WORDS, word);
    let count = words.iter().filter(numeric).count();
    words.first().is_some_and(|word| numeric(&word)) && count + 1 >= words.len()
}

/// Whether a word of the key, other than its first article, begins with a capital letter.
fn has_name(gold: &str) -> bool {
    let articles = ["The", "A", "An"];
    let capital = |word: &str| {
        let word = word.trim_start_matches(|c: char| !c.is_alphanumeric());
        word.chars().next().is_some_and(char::is_uppercase) && !articles.contains(&word)
    };
    gold.split_whitespace().any(capital)
}

/// What the clue's first "this" or "these" names, or else the person whom "he" or "she" at its head is.
fn pointed_at(question: &str) -> Option<AnswerType> {
    let words = lower_words(question);
    let pointers = words.iter().enumerate().filter(|(_, word)| matches!(word.as_str(), "this" | "these"));
    let named = pointers.map(|(place, _)| named_next(&words[place + 1..])).find(Option::is_some);
    if let Some(kind) = named {
        return kind;
    }
    let head = words.first()?.as_str();
    let person = matches!(head, "he" | "she" | "he's" | "she's" | "his" | "her" | "he’s" | "she’s");
    person.then_some(AnswerType::Person)
}

/// The kind of the first noun within reach; of "movie star" and "film capital" the last noun counts, of "king's city" not.
fn named_next(words: &[String]) -> Option<AnswerType> {
    let mut kind = None;
    for word in words.iter().take(POINTER_REACH) {
        let next = kind_of(word);
        if next.is_none() && kind.is_some() {
            break;
        }
        kind = next;
        if kind.is_some() && word.ends_with("'s") {
            break;
        }
    }
    kind
}

/// The kind that a noun names, in the singular, the plural or the genitive.
fn kind_of(word: &str) -> Option<AnswerType> {
    let word = word.strip_suffix("'s").or(word.strip_suffix("’s")).unwrap_or(word);
    let singular = word.strip_suffix('s').unwrap_or(word);
    let names = |nouns| among(nouns, word) || among(nouns, singular);
    if names(PERSONS) {
        Some(AnswerType::Person)
    } else if names(PLACES) {
        Some(AnswerType::Place)
    } else {
        names(WORKS).then_some(AnswerType::Work)
    }
}

fn among(list: &str, word: &str) -> bool {
    list.split(' ').any(|listed| listed == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_by_the_key() {
        use AnswerType::{Date, Name, Number, Thing, Work};
        let cases = [
            ("1905", Date),
            ("in 1905", Date),
            ("44 B.C.", Date),
            ("the 1920s", Date),
            ("the '60s", Date),
            ("the 19th century", Date),
            ("July 4th", Date),
            ("June 6, 1944", Date),
            ("May", Date),
            ("7", Number),
            ("$2,000", Number),
            ("75%", Number),
            ("twenty-one", Number),
            ("3.5 miles", Number),
            ("five (5)", Number),
            ("one hundred", Number),
            ("\"Greensleeves\"", Work),
            ("Marie Curie", Name),
            ("the Tower of Borrow", Name),
            ("The Who", Name),
            ("(the) Borrow", Name),
            ("a kiln", Thing),
            ("The", Thing),
            ("tin", Thing),
            ("", Thing),
        ];
        for (gold, want) in cases {
            assert_eq!(AnswerType::of("A clue that points at nothing", gold), want, "{gold:?}");
        }
    }

    #[test]
    fn types_by_what_the_clue_points_at() {
        use AnswerType::{Date, Name, Person, Place, Thing, Work};
        let cases = [
            ("This long river ends at Borrow", "the Nile", Place),
            ("The Golden Lantern stands in this windy old coastal city", "Borrow", Place),
            ("This actress's first part was a tree", "Ann Other", Person),
            ("These brothers, both poets, wrote it", "the Grims", Person),
            ("He painted it blue", "Ann Other", Person),
            ("She's the ruler of Borrow", "Ann Other", Person),
            ("Ann Other wrote this 1912 novel", "Borrow", Work),
            ("This movie star slept here", "Ann Other", Person),
            ("This epic hero's island", "Borrow", Person),
            ("This, the largest, orbits this planet", "Titan", Place),
            ("It was founded in this year by that man", "1905", Date),
            ("This metal melts early", "tin", Thing),
            ("This metal was named for a god", "Mercury", Name),
        ];
        for (question, gold, want) in cases {
            assert_eq!(AnswerType::of(question, gold), want, "{question:?}");
        }
    }
}
