//! A command's answer: human-readable text, JSON for programs, and an exit code. The module `cli` writes the answer.

use comfy_table::{Table, presets};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::exit::DONE;
use crate::base::clock::DatabaseTime;

pub(crate) struct Answer {
    /// The human-readable text. If it is not empty, it ends with a line break.
    pub(crate) text: String,
    /// The value for `--output json`; `None` if `text` is printed in both output formats.
    pub(crate) json: Option<Value>,
    /// The program's exit code.
    pub(crate) code: u8,
    /// The message to write to standard error if the answer cannot be written.
    pub(crate) if_lost: Option<String>,
}

impl Answer {
    /// Creates an answer whose text is printed in both output formats.
    pub(crate) fn text(mut text: String) -> Self {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        Self { text, json: None, code: DONE, if_lost: None }
    }

    /// Creates an answer from one object. The text has one line for each field: the fields in `first`, in that order,
    /// then all other fields.
    pub(crate) fn object(object: Value, first: &[&str]) -> Self {
        let others = object.as_object().into_iter().flatten().map(|(name, _)| name.as_str());
        let names = first.iter().copied().chain(others.filter(|name| !first.contains(name)));
        let rows = names.filter_map(|name| Some(vec![name.to_owned(), cell(object.get(name)?)]));
        Self { text: table(None, rows), json: Some(object), code: DONE, if_lost: None }
    }

    /// Creates an answer from a list of objects. The text has one row for each object, with the fields in `columns`.
    pub(crate) fn list(objects: Vec<Value>, columns: &[&str]) -> Self {
        let rows = objects.iter().map(|object| columns.iter().map(|column| cell(&object[*column])).collect());
        Self { text: table(Some(columns), rows), json: Some(Value::Array(objects)), code: DONE, if_lost: None }
    }

    /// Adds a member to the JSON object, but not to the text.
    pub(crate) fn member(mut self, name: &str, value: Value) -> Self {
        if let Some(Value::Object(members)) = &mut self.json {
            members.insert(name.to_owned(), value);
        }
        self
    }

    /// Adds a note below the text, but not to the JSON value.
    pub(crate) fn note(mut self, note: &str) -> Self {
        self.text.push('\n');
        self.text.push_str(note);
        self.text.push('\n');
        self
    }

    /// Sets the message to write to standard error if the answer cannot be written.
    pub(crate) fn if_lost(mut self, note: String) -> Self {
        self.if_lost = Some(note);
        self
    }

    pub(crate) const fn exit(mut self, code: u8) -> Self {
        self.code = code;
        self
    }
}

/// Formats a time as RFC 3339 in UTC.
pub(crate) fn time(at: DatabaseTime) -> Value {
    Value::String(at.to_string())
}

/// Formats a time as RFC 3339 in UTC, and `None` as null.
pub(crate) fn time_or_null(at: Option<DatabaseTime>) -> Value {
    at.map_or(Value::Null, time)
}

/// Formats rows in aligned columns without borders, so that tools such as `awk` can split the lines.
fn table(header: Option<&[&str]>, rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if let Some(header) = header {
        table.set_header(header.iter().map(|name| name.to_uppercase()));
    }
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines = table.lines().map(|line| format!("{}\n", line.trim_end()));
    lines.collect::<Vec<_>>().concat()
}

/// Formats a value as human-readable text: strings without quotes, null and empty values as `-`, times in whole
/// seconds. Replaces control characters, because they could control the terminal.
fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.is_empty() => return "-".to_owned(),
        Value::String(text) => seconds(text),
        Value::Array(values) if values.is_empty() => return "-".to_owned(),
        Value::Array(values) => values.iter().map(cell).collect::<Vec<_>>().join(" "),
        Value::Object(_) => value.to_string(),
    };
    text.replace(char::is_control, "\u{fffd}")
}

/// Removes the fraction of a second from an RFC 3339 time. Returns any other string unchanged.
fn seconds(text: &str) -> String {
    let Ok(at) = OffsetDateTime::parse(text, &Rfc3339) else { return text.to_owned() };
    let whole = at.replace_nanosecond(0).unwrap_or(at);
    whole.format(&Rfc3339).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_have_microseconds_in_json_and_seconds_in_text() {
        let at = DatabaseTime::from_micros(1_700_000_000_123_456);
        assert_eq!(time(at), json!("2023-11-14T22:13:20.123456Z"));
        assert_eq!(cell(&time(at)), "2023-11-14T22:13:20Z");
        assert_eq!(time(DatabaseTime::from_micros(i64::MAX)), json!("9223372036854775807 us"));
    }

    #[test]
    fn tables_have_no_borders_and_no_control_characters() {
        let objects = vec![json!({"name": "acme", "on": true}), json!({"name": "a\u{1b}[31m", "on": null})];
        let answer = Answer::list(objects, &["name", "on"]);
        let words: Vec<Vec<_>> = answer.text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words, [["NAME", "ON"], ["acme", "yes"], ["a\u{fffd}[31m", "-"]]);
        assert!(!answer.text.contains('|'));
    }
}
