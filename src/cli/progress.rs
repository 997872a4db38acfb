//! Progress bars for long commands. They appear on standard error, and only if standard error is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Returns a progress bar for reading an input of `length` bytes, or a spinner if the length is unknown.
pub(crate) fn reading(length: Option<u64>) -> ProgressBar {
    let template = if length.is_some() { "{wide_bar} {bytes}/{total_bytes}" } else { "{bytes} read" };
    length.map_or_else(ProgressBar::new_spinner, ProgressBar::new).with_style(style(template))
}

/// Returns a progress bar that counts keys. The caller sets its length once the number of keys is known.
pub(crate) fn keys() -> ProgressBar {
    ProgressBar::new(0).with_style(style("{wide_bar} {human_pos}/{human_len} keys"))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
