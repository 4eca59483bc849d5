//! Text without HTML: what a reader of the clue would have seen.
//!
//! Clues as they circulate carry links to media, a few inline tags, entities and stray backslashes. This is no HTML
//! parser: it knows tags, entities and nothing of nesting, which is all that such cells hold. `x < 5` stays, because a
//! tag begins with a letter or a slash; a tag that is never closed stays too.

/// A cell's visible text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Visible {
    /// The text, white space normalised.
    pub(crate) text: String,
    /// What of it stands outside links, if there were any.
    pub(crate) outside_links: Option<String>,
}

/// The visible text of a cell.
pub(crate) fn visible(cell: &str) -> Visible {
    let (text, outside) = if cell.contains('<') { without_tags(cell) } else { (cell.to_owned(), None) };
    Visible { text: plain(&text), outside_links: outside.map(|text| plain(&text)) }
}

/// Entities, backslashes and white space, in this order.
fn plain(text: &str) -> String {
    let decoded;
    let mut text = text;
    if text.contains('&') {
        decoded = decode_entities(text);
        text = &decoded;
    }
    let unescaped;
    if text.contains('\\') {
        unescaped = text.replace("\\\"", "\"").replace("\\'", "'");
        text = &unescaped;
    }
    normal_space(text)
}

/// One space between words, none at the ends, no control or zero-width characters.
pub(crate) fn normal_space(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        out.extend(word.chars().filter(|c| !matches!(c, '\u{200B}' | '\u{FEFF}' | '\u{2060}')));
    }
    out.truncate(out.trim_end().len());
    out
}

/// The text without tags, and what of it is outside `<a>` elements if there are any.
fn without_tags(cell: &str) -> (String, Option<String>) {
    let mut text = String::with_capacity(cell.len());
    let mut outside = String::new();
    let (mut links, mut inside) = (false, false);
    let mut rest = cell;
    while let Some(open) = rest.find('<') {
        let (before, from) = rest.split_at(open);
        push_both(before, inside, &mut text, &mut outside);
        let Some((tag, after)) = tag_at(from) else {
            push_both("<", inside, &mut text, &mut outside);
            rest = &from[1..];
            continue;
        };
        match tag_name(tag).as_str() {
            "a" => {
                links = true;
                inside = !tag.starts_with('/');
            }
            "br" | "p" | "div" | "li" | "tr" | "td" => {
                push_both(" ", inside, &mut text, &mut outside);
            }
            _ => {}
        }
        rest = after;
    }
    push_both(rest, inside, &mut text, &mut outside);
    (text, links.then_some(outside))
}

fn push_both(part: &str, inside: bool, text: &mut String, outside: &mut String) {
    text.push_str(part);
    if !inside {
        outside.push_str(part);
    }
}

/// The inside of the tag that `from` begins with, and what follows it.
fn tag_at(from: &str) -> Option<(&str, &str)> {
    let first = from[1..].chars().next()?;
    if !(first.is_ascii_alphabetic() || first == '/' || first == '!') {
        return None;
    }
    let close = from.find('>')?;
    Some((&from[1..close], &from[close + 1..]))
}

fn tag_name(tag: &str) -> String {
    tag.trim_start_matches('/')
        .chars()
        .take_while(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .collect()
}

fn decode_entities(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        // The longest name here has 8 letters.
        let end = rest.bytes().take(12).position(|byte| byte == b';');
        match end.and_then(|end| Some((entity(&rest[1..end])?, end))) {
            Some((c, end)) => {
                out.push(c);
                rest = &rest[end + 1..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

fn entity(name: &str) -> Option<char> {
    if let Some(number) = name.strip_prefix('#') {
        let hex = number.strip_prefix(['x', 'X']);
        let code = hex.map_or_else(|| number.parse().ok(), |hex| u32::from_str_radix(hex, 16).ok());
        return char::from_u32(code?).filter(|c| *c != '\0');
    }
    let latin = LATIN_1.split_ascii_whitespace().position(|known| known == name);
    if let Some(place) = latin {
        return char::from_u32(160 + place as u32);
    }
    OTHERS.iter().find(|(known, _)| *known == name).map(|&(_, c)| c)
}

/// HTML's names for U+00A0 to U+00FF, in order.
const LATIN_1: &str = "nbsp iexcl cent pound curren yen brvbar sect uml copy ordf laquo not shy reg macr deg plusmn \
    sup2 sup3 acute micro para middot cedil sup1 ordm raquo frac14 frac12 frac34 iquest Agrave Aacute Acirc Atilde \
    Auml Aring AElig Ccedil Egrave Eacute Ecirc Euml Igrave Iacute Icirc Iuml ETH Ntilde Ograve Oacute Ocirc Otilde \
    Ouml times Oslash Ugrave Uacute Ucirc Uuml Yacute THORN szlig agrave aacute acirc atilde auml aring aelig ccedil \
    egrave eacute ecirc euml igrave iacute icirc iuml eth ntilde ograve oacute ocirc otilde ouml divide oslash \
    ugrave uacute ucirc uuml yacute thorn yuml";

const OTHERS: &[(&str, char)] = &[
    ("amp", '&'),
    ("lt", '<'),
    ("gt", '>'),
    ("quot", '"'),
    ("apos", '\''),
    ("ndash", '–'),
    ("mdash", '—'),
    ("lsquo", '‘'),
    ("rsquo", '’'),
    ("ldquo", '“'),
    ("rdquo", '”'),
    ("hellip", '…'),
    ("bull", '•'),
    ("trade", '™'),
    ("euro", '€'),
    ("prime", '′'),
    ("oelig", 'œ'),
    ("OElig", 'Œ'),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn text(cell: &str) -> String {
        visible(cell).text
    }

    #[test]
    fn tags_go_and_their_text_stays() {
        assert_eq!(
            text(r#"In <a href="http://x/y.jpg" target="_blank">this</a> <i>opera</i>"#),
            "In this opera"
        );
        assert_eq!(text("H<sub>2</sub>O<br/>is wet"), "H2O is wet");
        assert_eq!(text("</a>loose"), "loose");
    }

    #[test]
    fn what_is_no_tag_stays() {
        assert_eq!(text("if 3 < 5 > 2"), "if 3 < 5 > 2");
        assert_eq!(text("<less"), "<less");
        assert_eq!(text("<"), "<");
        assert_eq!(text("I <3 U"), "I <3 U");
    }

    #[test]
    fn entities_are_decoded_after_the_tags() {
        assert_eq!(text("Q&amp;A &#39;caf&eacute;&#x2019;"), "Q&A 'café’");
        assert_eq!(text("&lt;i&gt; AT&T &bogus; &#0; &#xD800; &"), "<i> AT&T &bogus; &#0; &#xD800; &");
        assert_eq!(text("a&nbsp;b &frac34; &yuml; &iexcl;"), "a b ¾ ÿ ¡");
        assert_eq!(text("&€€€€;"), "&€€€€;");
    }

    #[test]
    fn stray_backslashes_and_spaces_go() {
        assert_eq!(text("\\\"Wood\\\"  \t and\r\nstone\u{200B} "), "\"Wood\" and stone");
        assert_eq!(text(" \u{FEFF} "), "");
    }

    #[test]
    fn text_outside_links_is_told_apart() {
        let v = visible("<a href=x>[video clue]</a> ok");
        assert_eq!((v.text.as_str(), v.outside_links.as_deref()), ("[video clue] ok", Some("ok")));
        assert_eq!(visible("<i>no link</i>").outside_links, None);
    }
}
