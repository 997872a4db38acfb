//! The environment: `TRUSTGATE__SECTION__NAME` sets `section.name`; commas separate the values of a list.
//!
//! Never looks at variables that begin otherwise: Kubernetes sets `TRUSTGATE_PORT` and the like for a service of that name.

use std::ffi::OsString;

use super::{SECTIONS, suggest};
use crate::base::settings::{RawValue, Reader};

const START: &str = "TRUSTGATE__";

/// Puts what `variables` set into `reader`; unknown names that begin with `TRUSTGATE__` are mistakes.
pub(crate) fn put(reader: &mut Reader, variables: &[(OsString, OsString)]) {
    let known: Vec<_> = SECTIONS
        .iter()
        .flat_map(|section| section.fields.iter().map(|field| (section.name, field.name)))
        .map(|(section, name)| (variable(section, name), section, name))
        .collect();
    for (name, value) in variables {
        let Some((name, rest)) = name.to_str().and_then(|name| Some((name, name.strip_prefix(START)?))) else {
            continue;
        };
        let Some((_, section, setting)) = known.iter().find(|(variable, ..)| variable == name) else {
            let near = suggest::nearest(
                &rest.to_ascii_uppercase(),
                known.iter().map(|(variable, ..)| &variable[START.len()..]),
            );
            let hint = near.map_or_else(
                || "see `trustgate config default`".to_owned(),
                |near| format!("did you mean {START}{near}?"),
            );
            reader.refuse_at(String::new(), name.to_owned(), format!("there is no such setting; {hint}"));
            continue;
        };
        match value.to_str() {
            Some(value) => reader.put(section, setting, RawValue::One(value.to_owned()), name.to_owned()),
            None => reader.refuse_at(format!("{section}.{setting}"), name.to_owned(), "is not UTF-8".to_owned()),
        }
    }
}

/// The variable that sets `section.name`.
pub(crate) fn variable(section: &str, name: &str) -> String {
    format!("{START}{}__{}", section.to_ascii_uppercase(), name.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use crate::config::tests::config_errors;

    #[test]
    fn unknown_variables_are_refused_with_the_nearest() {
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
