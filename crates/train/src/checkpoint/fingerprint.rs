//! Where two trees of settings differ.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Difference;

/// Every leaf that is not the same in both. Values are compared as the text of a file says them.
pub(super) fn differences(saved: &Value, now: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    compare("", Some(saved), Some(now), &mut found);
    found
}

fn compare(field: &str, saved: Option<&Value>, now: Option<&Value>, found: &mut Vec<Difference>) {
    if let (Some(Value::Object(saved)), Some(Value::Object(now))) = (saved, now) {
        let keys: BTreeSet<&String> = saved.keys().chain(now.keys()).collect();
        for key in keys {
            let field = if field.is_empty() { key.clone() } else { format!("{field}.{key}") };
            compare(&field, saved.get(key), now.get(key), found);
        }
        return;
    }
    let [saved, now] = [saved, now].map(|value| value.map(as_read));
    if saved != now {
        found.push(Difference { field: field.to_owned(), saved, now });
    }
}

/// A value's text after it has been in a file once: reading may change the last bit of a fraction.
fn as_read(value: &Value) -> String {
    let text = value.to_string();
    serde_json::from_str(&text).map_or(text, |read: Value| read.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_difference_is_named_with_both_values() {
        let saved = json!({"train": {"lr": 0.1, "batch": 4}, "targets": ["q", "v"], "old": 1});
        let now = json!({"train": {"lr": 0.2, "batch": 4}, "targets": ["q"], "new": null});
        let found: Vec<String> = differences(&saved, &now).iter().map(Difference::to_string).collect();
        assert_eq!(
            found,
            [
                "new is nothing there and null here",
                "old is 1 there and nothing here",
                r#"targets is ["q","v"] there and ["q"] here"#,
                "train.lr is 0.1 there and 0.2 here",
            ]
        );
        assert!(differences(&saved, &saved).is_empty());
    }

    #[test]
    fn a_fraction_that_was_in_a_file_is_the_same() {
        for number in 1..1000 {
            let now = json!(f64::from(number) / 7e5);
            let saved: Value = serde_json::from_str(&now.to_string()).unwrap();
            assert!(differences(&saved, &now).is_empty(), "{now}");
        }
    }
}
