//! Reads settings from environment variables: `TRUSTGATE__SECTION__NAME` sets `section.name`. Commas separate the
//! values of a list.
//!
//! Variables with another prefix are ignored, because Kubernetes sets `TRUSTGATE_PORT` and similar variables for a
//! service named trustgate.

use std::ffi::OsString;

use super::{SECTIONS, suggest};
use crate::base::settings::{RawValue, Reader};

const PREFIX: &str = "TRUSTGATE__";

/// Adds the settings in `variables` to `reader`. An unknown name that begins with `TRUSTGATE__` is an error.
pub(crate) fn put(reader: &mut Reader, variables: &[(OsString, OsString)]) {
    let known: Vec<_> = SECTIONS
        .iter()
        .flat_map(|section| section.fields.iter().map(|field| (section.name, field.name)))
        .map(|(section, name)| (variable(section, name), section, name))
        .collect();
    for (name, value) in variables {
        let Some((name, rest)) = name.to_str().and_then(|name| Some((name, name.strip_prefix(PREFIX)?))) else {
            continue;
        };
        let Some((_, section, setting)) = known.iter().find(|(variable, ..)| variable == name) else {
            let problem =
                renamed(rest).unwrap_or_else(|| format!("there is no such setting; {}", suggestion(rest, &known)));
            reader.refuse_at(String::new(), name.to_owned(), problem);
            continue;
        };
        if let Some(value) = value.to_str() {
            reader.put(section, setting, RawValue::One(value.to_owned()), name.to_owned());
        } else {
            let problem = "the value is not UTF-8".to_owned();
            reader.refuse_at(format!("{section}.{setting}"), name.to_owned(), problem);
        }
    }
}

/// Returns the error for the variable [`PREFIX`]`rest`; `None` if its setting was not renamed.
fn renamed(rest: &str) -> Option<String> {
    let (section, name) = rest.split_once("__")?;
    suggest::renamed(&section.to_ascii_lowercase(), &name.to_ascii_lowercase(), variable)
}

/// Returns a suggestion for the unknown variable [`PREFIX`]`rest`: the most similar name in `known`, which contains all
/// known variables, or a pointer to the list of all settings.
fn suggestion(rest: &str, known: &[(String, &str, &str)]) -> String {
    let names = known.iter().map(|(variable, ..)| &variable[PREFIX.len()..]);
    suggest::nearest(&rest.to_ascii_uppercase(), names)
        .map_or_else(|| "see `trustgate config default`".to_owned(), |near| format!("did you mean {PREFIX}{near}?"))
}

/// Returns the name of the environment variable that sets `section.name`.
pub(crate) fn variable(section: &str, name: &str) -> String {
    format!("{PREFIX}{}__{}", section.to_ascii_uppercase(), name.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use crate::config::tests::config_errors;

    #[test]
    fn unknown_variables_are_refused_with_a_suggestion() {
        for (name, want) in [
            (
                "TRUSTGATE__STORE__ULR",
                "TRUSTGATE__STORE__ULR: there is no such setting; did you mean TRUSTGATE__STORE__URL?",
            ),
            (
                "TRUSTGATE__STORE_URL",
                "TRUSTGATE__STORE_URL: there is no such setting; did you mean TRUSTGATE__STORE__URL?",
            ),
            ("TRUSTGATE__Store__Url", "TRUSTGATE__Store__Url: there is no such setting; did you mean"),
        ] {
            let got = config_errors("", &[(name, "hunter2")]);
            assert!(got.len() == 1 && got[0].starts_with(want) && !got[0].contains("hunter2"), "{got:?}");
        }
    }
}
