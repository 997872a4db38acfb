//! Suggests a known name in place of an unknown one.
//!
//! If no known name is similar, there is no suggestion, because a list of all names is more helpful than a bad guess.

/// The minimum similarity of a suggested name, from 0 to 1 (identical).
const SIMILARITY_MIN: f64 = 0.5;

/// Returns the name in `names` that is most similar to `wrong`; `None` if no name is similar enough.
pub(crate) fn nearest<'n>(wrong: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names
        .map(|name| (strsim::normalized_damerau_levenshtein(wrong, name), name))
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, name)| name)
}

/// Settings that had a different name in an earlier release: the old section and name, the new section and name, and a
/// string that is appended to the error.
const RENAMED: [(&str, &str, (&str, &str), &str); 4] = [
    ("cache", "absences_size", ("cache", "negative_size"), ""),
    ("freshness", "absence_ttl", ("freshness", "negative_ttl"), ""),
    ("freshness", "hints", ("freshness", "notifications"), ""),
    (
        "freshness",
        "canary_interval",
        ("canary", "interval"),
        ", and the canary is a separate process: `trustgate canary`",
    ),
];

/// Returns the error for a setting that an earlier release called `section.name`; `None` if there was no such setting.
/// `show` formats the new section and name.
pub(crate) fn renamed(section: &str, name: &str, show: impl Fn(&str, &str) -> String) -> Option<String> {
    let (.., (new_section, new), explanation) = RENAMED.iter().find(|(of, old, ..)| *of == section && *old == name)?;
    Some(format!("this setting is now called {}{explanation}", show(new_section, new)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_similar_names_are_suggested() {
        let names = ["url", "url_file", "read_timeout", "connect_timeout"];
        for (wrong, want) in [
            ("ulr", Some("url")),
            ("urlfile", Some("url_file")),
            ("timeout", Some("read_timeout")),
            ("colour_of_the_sky", None),
        ] {
            assert_eq!(super::nearest(wrong, names.into_iter()), want, "{wrong}");
        }
    }
}
