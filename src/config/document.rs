//! Generates the documentation of all settings as a TOML file to start from, as a Markdown page and as JSON. All three
//! are generated from the setting declarations and do not contain configured values.

use serde_json::json;

use super::{SECTIONS, environment::variable};
use crate::base::settings::Field;

/// Returns a configuration file with all settings, their descriptions and their defaults. Settings without a default
/// are commented out.
#[must_use]
pub(crate) fn toml() -> String {
    let mut lines = vec![
        "# All settings of trustgate with their defaults. Settings without a default are commented out.".to_owned(),
        "# The environment variable TRUSTGATE__SECTION__NAME overrides a setting; commas separate the values of a list."
            .to_owned(),
    ];
    for section in SECTIONS {
        lines.push(String::new());
        lines.extend(prose(section.doc).map(|line| format!("# {line}")));
        lines.push(format!("[{}]", section.name));
        for field in section.fields {
            lines.extend(prose(field.doc).map(|line| format!("# {line}")));
            let unset = if field.default.is_empty() { "# " } else { "" };
            lines.push(format!("{unset}{} = {}", field.name, value(field)));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

/// Returns the documentation of all settings as a Markdown page.
#[cfg(test)]
pub(crate) fn markdown() -> String {
    let mut lines = vec![PAGE_START.to_owned()];
    for section in SECTIONS {
        lines.push(format!("\n## `[{}]`\n", section.name));
        lines.extend(prose(section.doc).map(str::to_owned));
        lines.push("\n| setting | default | meaning |\n|---|---|---|".to_owned());
        for field in section.fields {
            let default = if field.default.is_empty() { "unset".to_owned() } else { format!("`{}`", value(field)) };
            lines.push(format!("| `{}` | {default} | {} |", field.name, sentence(field.doc).replace('|', "\\|")));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
const PAGE_START: &str = "# Configuration

trustgate reads one TOML file: pass its path with `--config FILE` or in the environment variable `TRUSTGATE_CONFIG`.
Without a file, the defaults below apply. The environment variable `TRUSTGATE__SECTION__NAME` overrides a setting in the
file; commas separate the values of a list. Durations and sizes need a unit. An unknown name is an error, both in the
file and in a variable that begins with `TRUSTGATE__`.

`trustgate config default` prints a file to start from. `trustgate config check` validates the configuration and lists
all errors.

If a setting exists with and without `_file` at the end of its name, the one with `_file` is the path of a file that
contains the value. Set only one of the two.

This page is generated from the code: `UPDATE=1 cargo test --locked --lib config` regenerates it.";

/// Returns the documentation of all settings as JSON.
#[must_use]
pub(crate) fn json() -> serde_json::Value {
    let all = SECTIONS.iter().flat_map(|section| section.fields.iter().map(|field| (section.name, field)));
    all.map(|(section, field)| {
        json!({
            "setting": format!("{section}.{}", field.name),
            "variable": variable(section, field.name),
            "default": (!field.default.is_empty()).then_some(field.default),
            "expected": field.expected,
            "meaning": sentence(field.doc),
        })
    })
    .collect()
}

/// Formats the default of a setting as TOML, with numbers and booleans unquoted.
fn value(field: &Field) -> String {
    let default = field.default;
    let is_number = default.parse::<u64>().is_ok_and(|number| number.to_string() == default);
    if is_number || default.parse::<bool>().is_ok() { default.to_owned() } else { format!("\"{default}\"") }
}

/// Returns the lines of a doc comment, trimmed.
fn prose(doc: &str) -> impl Iterator<Item = &str> {
    doc.lines().map(str::trim)
}

/// Joins the lines of a doc comment into one line.
fn sentence(doc: &str) -> String {
    prose(doc).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use crate::config::tests::config_errors;

    #[test]
    fn default_configuration_file_is_valid_and_contains_all_settings() {
        assert_eq!(config_errors(&super::toml(), &[]), [""; 0]);
        // Uncomment all settings. Their values may be invalid, but every name must be known.
        let all: String = super::toml()
            .lines()
            .map(|line| if line.ends_with("= \"\"") { &line[2..] } else { line }.to_owned() + "\n")
            .collect();
        let got = config_errors(&all, &[]);
        assert!(!got.is_empty() && !got.iter().any(|config_error| config_error.contains("no such")), "{got:?}");
    }

    #[test]
    fn configuration_page_in_docs_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, super::markdown()).unwrap();
        }
        let page = std::fs::read_to_string(path).unwrap_or_default();
        let is_current = page == super::markdown();
        assert!(is_current, "docs/configuration.md is out of date: run `UPDATE=1 cargo test --locked --lib config`");
    }
}
