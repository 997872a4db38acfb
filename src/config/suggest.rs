//! Suggests a known name in place of an unknown one.
//!
//! If no name is similar, there is no suggestion: a list of all names is more helpful than a bad guess.

/// The minimum similarity of a suggestion; 1 means identical.
const SIMILARITY_MIN: f64 = 0.5;

/// The name in `names` that is most similar to `wrong`, if it is similar enough.
pub(crate) fn nearest<'n>(wrong: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names
        .map(|name| (strsim::normalized_damerau_levenshtein(wrong, name), name))
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, name)| name)
}

/// Settings that had another name in an earlier release: section, old name; section, new name; an explanation.
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

/// The error for a setting that an earlier release called `section.name`. `show` formats the current name from its
/// section and its name.
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
