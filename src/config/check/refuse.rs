//! Rules that many checks share. Each rule adds an error if several settings do not fit together.

use crate::base::{secret::Secret, settings::Reader};

/// Returns true if none of `settings` has an error, so that their values can be compared.
pub(super) fn sound(reader: &Reader, settings: &[&str]) -> bool {
    !reader.config_errors().iter().any(|config_error| settings.contains(&config_error.setting.as_str()))
}

/// Refuses `section.name` if it is set and `section.other` is not.
pub(super) fn needs(
    reader: &mut Reader,
    section: &str,
    (name, is_set): (&str, bool),
    (other, other_is_set): (&str, bool),
) {
    if is_set && !other_is_set {
        reader.refuse(section, name, format!("also needs {section}.{other}"));
    }
}

/// Refuses the `_file` variant of `section.name` if both are set.
pub(super) fn either(reader: &mut Reader, section: &str, name: &str, value: bool, file: bool) {
    if value && file {
        let other = reader.origin(section, name).cloned().unwrap_or_default();
        let problem = format!("{section}.{name} is also set ({other}): set only one of the two");
        reader.refuse(section, &format!("{name}_file"), problem);
    }
}

/// Refuses a URL that begins with none of `schemes`, with the error `expected`. The URL may contain a password, so the
/// error does not quote it.
pub(super) fn scheme(
    reader: &mut Reader,
    section: &str,
    name: &str,
    url: Option<&Secret>,
    schemes: &[&str],
    expected: &str,
) {
    if url.is_some_and(|url| !schemes.iter().any(|scheme| url.expose().starts_with(scheme))) {
        reader.refuse(section, name, expected.to_owned());
    }
}

/// Adds an error about several `settings`, at the first one that is set.
pub(super) fn refuse_first_set(reader: &mut Reader, settings: &[(&str, &str)], problem: String) {
    let set = settings.iter().find(|(section, name)| reader.origin(section, name).is_some());
    // The defaults do not conflict, so an error means that at least one of the settings is set. The fallback to the
    // first setting is only a safeguard.
    let Some((section, name)) = set.or(settings.first()) else { return };
    reader.refuse(section, name, problem);
}
