//! What somebody may have meant by a name that does not exist.
//!
//! Never guesses far: a bad guess is worse than the list of what there is.

/// Below this likeness (1 is equal) a name is not offered.
const LIKENESS_MIN: f64 = 0.5;

/// Whichever of `names` is most like `wrong`, if one is alike at all.
pub(crate) fn nearest<'n>(wrong: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names
        .map(|name| (strsim::normalized_damerau_levenshtein(wrong, name), name))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_what_is_alike_is_offered() {
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
