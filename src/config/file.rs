//! Reads the TOML file: the value and the line number of each setting.
//!
//! This module does not parse the values, and its errors do not quote them.

use toml_edit::{Document, TableLike, Value};

use super::{SECTIONS, SectionInfo, section, suggest};
use crate::base::settings::{RawValue, Reader};

/// Adds the settings in `text`, the content of `path`, to `reader`. An unknown name is an error.
pub(crate) fn put(reader: &mut Reader, path: &str, text: &str) {
    let lines = Lines { path, text };
    let document = match Document::parse(text) {
        Ok(document) => document,
        // The `Display` form of the error would quote the line, which may contain a secret.
        Err(error) => {
            return reader.refuse_at("not TOML".to_owned(), lines.origin(error.span()), error.message().to_owned());
        }
    };
    let root = document.as_table();
    for (name, item) in root {
        let origin = lines.origin(root.key(name).and_then(toml_edit::Key::span).or_else(|| item.span()));
        match (section(name), item.as_table_like()) {
            (Some(section), Some(table)) => put_section(reader, section, table, &lines),
            (Some(_), None) => reader.refuse_at(name.to_owned(), origin, format!("expected a section: [{name}]")),
            (None, _) => {
                let problem =
                    no_such("section", name, SECTIONS.iter().map(|section| section.name), |name| format!("[{name}]"));
                reader.refuse_at(name.to_owned(), origin, problem);
            }
        }
    }
}

fn put_section(reader: &mut Reader, section: &SectionInfo, table: &dyn TableLike, lines: &Lines<'_>) {
    for (name, item) in table.iter() {
        let origin = lines.origin(table.key(name).and_then(toml_edit::Key::span).or_else(|| item.span()));
        let full = format!("{}.{name}", section.name);
        let known = section.fields.iter().any(|field| field.name == name);
        match item.as_value().and_then(|value| written(value, lines.text)) {
            Some(written) if known => reader.put(section.name, name, written, origin),
            None if known => reader.refuse_at(full, origin, "expected a value or a list of values".to_owned()),
            _ => {
                let names = section.fields.iter().map(|field| field.name);
                let full_name = |name: &str| format!("{}.{name}", section.name);
                let problem = suggest::renamed(section.name, name, |section, name| format!("{section}.{name}"))
                    .unwrap_or_else(|| no_such("setting", name, names, full_name));
                reader.refuse_at(full, origin, problem);
            }
        }
    }
}

/// Returns the error for the unknown name `wrong`. The error suggests the most similar name in `names`, or lists all
/// names if no name is similar.
pub(crate) fn no_such<'n>(
    what: &str,
    wrong: &str,
    names: impl Iterator<Item = &'n str> + Clone,
    show: impl Fn(&str) -> String,
) -> String {
    if let Some(near) = suggest::nearest(wrong, names.clone()) {
        return format!("there is no such {what}; did you mean {}?", show(near));
    }
    let all: Vec<_> = names.map(show).collect();
    format!("there is no such {what}; use one of {}", all.join(", "))
}

/// Returns a TOML value as strings. Numbers are formatted in decimal, booleans as `true` or `false`. An integer written
/// with `0x`, `0o` or `0b` keeps its spelling, because the setting for permission bits accepts only octal numbers.
fn written(value: &Value, text: &str) -> Option<RawValue> {
    let scalar = |value| scalar(value, text);
    match value {
        Value::Array(array) => array.iter().map(scalar).collect::<Option<Vec<_>>>().map(RawValue::Many),
        value => scalar(value).map(RawValue::One),
    }
}

fn scalar(value: &Value, text: &str) -> Option<String> {
    match value {
        Value::String(text) => Some(text.value().clone()),
        Value::Integer(number) => {
            let written = value.span().and_then(|span| text.get(span)).unwrap_or_default().replace('_', "");
            let has_base = ["0x", "0o", "0b"].iter().any(|base| written.starts_with(base));
            Some(if has_base { written } else { number.value().to_string() })
        }
        Value::Float(number) => Some(number.value().to_string()),
        Value::Boolean(truth) => Some(truth.value().to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::InlineTable(_) => None,
    }
}

/// Finds the line number of a position in `text`.
struct Lines<'t> {
    path: &'t str,
    text: &'t str,
}

impl Lines<'_> {
    fn origin(&self, span: Option<std::ops::Range<usize>>) -> String {
        let Some(span) = span else { return self.path.to_owned() };
        let before = self.text.get(..span.start).unwrap_or_default();
        format!("{}:{}", self.path, before.matches('\n').count() + 1)
    }
}

#[cfg(test)]
mod tests {
    use crate::config::tests::config_errors;

    #[test]
    fn old_setting_names_are_refused_with_the_new_name() {
        for (old, new) in [
            ("cache.absences_size = \"1MiB\"", "cache.negative_size"),
            ("freshness.absence_ttl = \"1s\"", "freshness.negative_ttl"),
            ("freshness.hints = false", "freshness.notifications"),
            (
                "freshness.canary_interval = \"1m\"",
                "canary.interval, and the canary is a separate process: `trustgate canary`",
            ),
        ] {
            let got = config_errors(old, &[]);
            let want = format!("this setting is now called {new}");
            assert!(got.len() == 1 && got[0].ends_with(&want), "{old}: {got:?}");
        }
        let got = config_errors("", &[("TRUSTGATE__FRESHNESS__HINTS", "false")]);
        assert!(got.len() == 1 && got[0].ends_with("now called TRUSTGATE__FRESHNESS__NOTIFICATIONS"), "{got:?}");
    }

    #[test]
    fn invalid_sections_and_values_are_refused() {
        for (text, want) in [
            ("grpc = 1", "trustgate.toml:1: grpc: expected a section: [grpc]"),
            ("[[grpc]]\nlisten = \"127.0.0.1:1\"", "trustgate.toml:1: grpc: expected a section: [grpc]"),
            ("[grpc]\nlisten = {a = 1}", "trustgate.toml:2: grpc.listen: expected a value or a list of values"),
            ("\n\n[grpc\nlisten = 1", "trustgate.toml:3: not TOML: "),
            ("[redis]\npassword = \"hunter2", "trustgate.toml:2: not TOML: "),
            ("[cache]\nsize = 5.5", "trustgate.toml:2: cache.size: expected a size with its unit"),
        ] {
            let got = config_errors(text, &[]);
            assert!(got.len() == 1 && got[0].starts_with(want), "{text:?}: {got:?}");
            assert!(!got[0].contains("hunter2"), "{got:?}");
        }
    }

    #[test]
    fn permission_bits_must_be_octal() {
        for mode in ["\"0660\"", "0o660", "\"0o660\""] {
            assert_eq!(config_errors(&format!("grpc.socket_mode = {mode}"), &[]), [""; 0], "{mode}");
        }
        // Decimal numbers are refused because they are ambiguous: 432 equals 0o660, but 0o432 would let all users
        // connect.
        for mode in ["432", "660", "\"660\"", "0x1b0", "0b110110000", "0o1000"] {
            let got = config_errors(&format!("grpc.socket_mode = {mode}"), &[]);
            assert!(got.len() == 1 && got[0].contains("permission bits in octal"), "{mode}: {got:?}");
        }
        assert_eq!(config_errors("store.connections_max = 0x8", &[]), [""; 0]);
    }

    #[test]
    fn dotted_keys_and_inline_tables_are_accepted() {
        for text in ["grpc.listen = \"127.0.0.1:1\"", "grpc = {listen = \"127.0.0.1:1\"}"] {
            assert_eq!(config_errors(text, &[]), [""; 0], "{text}");
        }
    }
}
