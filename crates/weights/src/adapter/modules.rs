//! Which modules of a model a PEFT configuration means, and which of its patterns a module answers to.
//!
//! PEFT matches names and Python patterns against the paths of modules, and so does this, with an engine whose time is
//! bounded by the lengths of pattern and path. What it trades: patterns that look ahead or refer back, which that
//! engine does not have. What it refuses: those, and patterns that would need much memory.

use buzzer_model::{Target, block_tensor};
use regex::bytes::{Regex, RegexBuilder};

/// Bytes that a compiled pattern may take. One of a hundred names takes some kilobytes.
const MAX_PATTERN_BYTES: usize = 1 << 18;

/// A linear of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Module {
    pub(super) layer: usize,
    pub(super) target: Target,
}

/// Modules by their names or by a pattern.
#[derive(Debug)]
pub(super) enum Spec {
    /// All linears but the head.
    AllLinear,
    /// Those whose path is one of these, or ends in one after a dot.
    Names(Vec<String>),
    /// Those whose whole path matches.
    Pattern(Regex),
}

impl Module {
    /// `model.layers.N.self_attn.q_proj`: what PEFT matches against.
    pub(super) fn path(self) -> String {
        block_tensor(self.layer, self.target.hf_path())
    }
}

impl Spec {
    /// A pattern as it stands in a configuration.
    pub(super) fn pattern(pattern: &str) -> Result<Self, String> {
        Ok(Self::Pattern(compile(&format!("^(?:{pattern})$"), pattern)?))
    }

    pub(super) fn selects(&self, module: Module) -> bool {
        let path = module.path();
        match self {
            Self::AllLinear => true,
            Self::Names(names) => names.iter().any(|name| {
                path.strip_suffix(name.as_str())
                    .is_some_and(|before| before.is_empty() || before.ends_with('.'))
            }),
            Self::Pattern(pattern) => pattern.is_match(path.as_bytes()),
        }
    }
}

/// Whether modules answer to a key of `rank_pattern` or `alpha_pattern`: the end of their path, from a dot on, matches.
pub(super) fn answering(key: &str, modules: &[Module]) -> Result<Vec<bool>, String> {
    let pattern = compile(&format!(r"^(?:.*\.)?(?:{key})$"), key)?;
    Ok(modules.iter().map(|module| pattern.is_match(module.path().as_bytes())).collect())
}

fn compile(whole: &str, part: &str) -> Result<Regex, String> {
    // Paths are ASCII, and tables of other letters would take most of a pattern's memory.
    let built = RegexBuilder::new(whole).unicode(false).size_limit(MAX_PATTERN_BYTES).build();
    built.map_err(|error| {
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let shown: String = part.chars().take(80).collect();
        format!("the pattern `{shown}` cannot be matched here ({reason}): give a list of names instead")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q11: Module = Module { layer: 11, target: Target::Q };

    #[test]
    fn names_are_ends_of_paths_and_patterns_whole_paths() {
        let names = |names: &[&str]| Spec::Names(names.iter().map(|&name| name.to_owned()).collect());
        for name in
            ["q_proj", "self_attn.q_proj", "layers.11.self_attn.q_proj", "model.layers.11.self_attn.q_proj"]
        {
            assert!(names(&["up_proj", name]).selects(Q11), "{name}");
        }
        for name in ["", "proj", "_proj", "1.self_attn.q_proj", "xmodel.layers.11.self_attn.q_proj", "k_proj"]
        {
            assert!(!names(&[name]).selects(Q11), "{name}");
        }
        for (pattern, selected) in [
            (r".*q_proj", true),
            (r".*layers\.(1|11)\..*", true),
            (r"model.*(q|k)_proj", true),
            (r"q_proj", false),
            (r".*q_pro", false),
            (r".*layers\.1\..*|x", false),
        ] {
            assert_eq!(Spec::pattern(pattern).unwrap().selects(Q11), selected, "{pattern}");
        }
        assert!(Spec::AllLinear.selects(Q11));
    }

    #[test]
    fn keys_of_patterns_match_from_a_dot_on() {
        for (key, answers) in [
            ("q_proj", true),
            (r"layers\.\d+\.self_attn\.q_proj", true),
            ("layers.11.self_attn.q_proj", true),
            ("model.layers.11.self_attn.q_proj", true),
            ("layers.1.self_attn.q_proj", false),
            ("proj", false),
            ("q_proj|x", true),
            ("x|q_pro", false),
        ] {
            assert_eq!(answering(key, &[Q11]).unwrap(), [answers], "{key}");
        }
    }

    #[test]
    fn patterns_that_cannot_be_bounded_are_refused() {
        for pattern in ["(?!x).*", r"(a)\1", "(", "((a{1000}){1000}){1000}", "*"] {
            let error = Spec::pattern(pattern).unwrap_err();
            assert!(error.contains(pattern) && error.contains("list of names"), "{error}");
        }
        // A pattern that takes exponential time where an engine tries one way after the other.
        let evil = Spec::pattern("(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*y").unwrap();
        assert!(!evil.selects(Q11));
    }
}
