//! The configuration described: as a file to start from, as a page, and as data. All from the same declarations.
//!
//! Never shows what is set here, only what can be set.

use serde_json::json;

use super::{SECTIONS, environment::variable};
use crate::base::settings::Field;

/// A file with every setting, its meaning and its default; what is unset by default is commented out.
#[must_use]
pub fn toml() -> String {
    let mut lines = vec![
        "# Every setting of trustgate with its default. What has none is commented out.".to_owned(),
        "# Each can also be set by a variable: TRUSTGATE__SECTION__NAME, with commas between the values of a list."
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

/// The same as a page in Markdown.
#[must_use]
pub fn markdown() -> String {
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

const PAGE_START: &str = "# Configuration

One TOML file, named by `--config FILE` or by the variable `TRUSTGATE_CONFIG`; with none, the defaults below hold.
Each setting can also be given by a variable, `TRUSTGATE__SECTION__NAME`, which wins over the file; commas separate
the values of a list. Durations and sizes carry their unit. A name that does not exist is a mistake, in the file as in
the environment. `trustgate config check` tells all mistakes at once, `trustgate config default` prints a file to
start from.

A setting that ends in `_file` names a file which holds the value; it and the setting without `_file` exclude each
other.

This page is made from the declarations in the code: `UPDATE=1 cargo test --lib config` writes it anew.";

/// The same as data.
#[must_use]
pub fn json() -> serde_json::Value {
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

/// The default as TOML; numbers and booleans without quotes.
fn value(field: &Field) -> String {
    let default = field.default;
    let is_number = default.parse::<u64>().is_ok_and(|number| number.to_string() == default);
    if is_number || default.parse::<bool>().is_ok() { default.to_owned() } else { format!("\"{default}\"") }
}

/// The lines of a doc comment.
fn prose(doc: &str) -> impl Iterator<Item = &str> {
    doc.lines().map(str::trim)
}

/// A doc comment on one line.
fn sentence(doc: &str) -> String {
    prose(doc).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use crate::config::tests::config_errors;

    #[test]
    fn the_default_file_says_what_the_defaults_are() {
        assert_eq!(config_errors(&super::toml(), &[]), [""; 0]);
        // With every comment taken off a setting, each is known (a mistake in its value aside).
        let all: String = super::toml()
            .lines()
            .map(|line| if line.ends_with("= \"\"") { &line[2..] } else { line }.to_owned() + "\n")
            .collect();
        let got = config_errors(&all, &[]);
        assert!(!got.is_empty() && !got.iter().any(|config_error| config_error.contains("no such")), "{got:?}");
    }

    #[test]
    fn the_page_in_docs_is_the_one_made_here() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, super::markdown()).unwrap();
        }
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(page == super::markdown(), "docs/configuration.md is old: run `UPDATE=1 cargo test --lib config`");
    }
}
