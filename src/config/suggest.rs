//! Suggests a known name in place of an unknown one.
//!
//! If no name is similar, there is no suggestion: a list of all names is more helpful than a bad guess.

/// The lowest similarity of a suggestion, where 1 is equal.
const SIMILARITY_MIN: f64 = 0.5;

/// The one of `names` that is most similar to `wrong`, if it is similar enough.
pub(crate) fn nearest<'n>(wrong: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names
        .map(|name| (strsim::normalized_damerau_levenshtein(wrong, name), name))
        .filter(|(similarity, _)| *similarity >= SIMILARITY_MIN)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, name)| name)
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
