//! How far long work is, on standard error and only if that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Of an input of this many bytes, where that is known.
pub(crate) fn reading(length: Option<u64>) -> ProgressBar {
    let template = if length.is_some() { "{wide_bar} {bytes}/{total_bytes}" } else { "{bytes} read" };
    length.map_or_else(ProgressBar::new_spinner, ProgressBar::new).with_style(style(template))
}

/// Of keys, as soon as it is known how many there are.
pub(crate) fn keys() -> ProgressBar {
    ProgressBar::new(0).with_style(style("{wide_bar} {human_pos}/{human_len} keys"))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
