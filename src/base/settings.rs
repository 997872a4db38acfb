//! Settings. Each setting has a section, a name, a type, a default, and a description for operators.
//!
//! A module declares its section with `settings!`. The module `config` reads the file and the environment variables.
//! Errors from this module do not contain values, because a value may be a secret.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    secret::Secret,
    text,
    units::{ByteSize, parse_duration},
};

/// A value as the operator wrote it, before parsing. Numbers and booleans from the file are stored as text.
#[derive(Clone, PartialEq, Eq)]
pub enum RawValue {
    /// One value.
    One(String),
    /// A list of values.
    Many(Vec<String>),
}

/// The place where a value was set, for messages: `trustgate.toml:12` or `TRUSTGATE__GRPC__LISTEN`.
pub(crate) type Origin = String;

/// One error in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The setting, as `section.name`.
    pub setting: String,
    /// The place where the setting is set; `None` if the setting is not set.
    pub origin: Option<Origin>,
    /// The problem and its remedy, without the value of a secret.
    pub problem: String,
}

/// Formats the error as one line, which begins with the place where the setting is set.
impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { setting, origin, problem } = self;
        match origin {
            Some(origin) if setting.is_empty() => write!(f, "{origin}: {problem}"),
            Some(origin) => write!(f, "{origin}: {setting}: {problem}"),
            None => write!(f, "{setting} (not set): {problem}"),
        }
    }
}

/// A type that a setting can have.
pub trait Setting: Sized {
    /// The accepted form, for messages: "a duration with its unit, such as 150ms".
    const EXPECTED: &'static str;
    /// Parses a value. Returns `None` if `written` does not have the accepted form.
    fn read(written: &RawValue) -> Option<Self>;
    /// Returns the value of a setting that has no default and is not set.
    #[must_use]
    fn unset() -> Option<Self> {
        None
    }
}

/// The documentation of a setting.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// The name of the setting inside its section.
    pub name: &'static str,
    /// The description of the setting, in one or a few lines.
    pub doc: &'static str,
    /// The default, as an operator would write it; `""` if the setting has no default.
    pub default: &'static str,
    /// The accepted form of a value, for messages.
    pub expected: &'static str,
}

/// A section of the configuration.
pub trait Section: Sized {
    /// The name of the section: `[name]` in the file.
    const NAME: &'static str;
    /// The description of the section.
    const DOC: &'static str;
    /// The settings of the section, in the order of the documentation.
    const FIELDS: &'static [Field];
    /// Reads the section from `reader`, with defaults for settings that are not set. Adds a configuration error to
    /// `reader` for each invalid value.
    fn read(reader: &mut Reader) -> Self;
}

/// The values from the file and the environment, and the configuration errors found so far.
#[derive(Default)]
pub struct Reader {
    written: BTreeMap<(String, String), (RawValue, Origin)>,
    config_errors: Vec<ConfigError>,
}

impl Reader {
    /// Records that `section.name` was set to `written` at `origin`. A later call replaces the value of an earlier
    /// call. The environment is read after the file, so it overrides the file.
    pub fn put(&mut self, section: &str, name: &str, written: RawValue, origin: Origin) {
        self.written.insert((section.to_owned(), name.to_owned()), (written, origin));
    }

    /// Returns the place where `section.name` is set; `None` if it is not set.
    #[must_use]
    pub fn origin(&self, section: &str, name: &str) -> Option<&Origin> {
        self.written.get(&(section.to_owned(), name.to_owned())).map(|(_, origin)| origin)
    }

    /// Adds a configuration error about `section.name`.
    pub fn refuse(&mut self, section: &str, name: &str, problem: String) {
        let origin = self.origin(section, name).cloned();
        self.config_errors.push(ConfigError { setting: format!("{section}.{name}"), origin, problem });
    }

    /// Adds a configuration error at `origin`. `setting` need not be a known setting.
    pub fn refuse_at(&mut self, setting: String, origin: Origin, problem: String) {
        self.config_errors.push(ConfigError { setting, origin: Some(origin), problem });
    }

    /// Returns the value of a setting, or the default if the setting is not set. If the value is invalid, adds a
    /// configuration error and returns the default.
    ///
    /// # Panics
    /// If `default` is invalid. This is a programming error in the declaration, which a test of all defaults detects.
    pub fn take<T: Setting>(&mut self, section: &str, name: &str, default: &'static str) -> T {
        let written = self.written.get(&(section.to_owned(), name.to_owned())).map(|(written, _)| written);
        if let Some(value) = written.and_then(T::read) {
            return value;
        }
        if written.is_some() {
            self.refuse(section, name, format!("expected {}", T::EXPECTED));
        }
        let fallback = if default.is_empty() { T::unset() } else { T::read(&RawValue::One(default.to_owned())) };
        fallback.unwrap_or_else(|| panic!("the default of {section}.{name} is not {}", T::EXPECTED))
    }

    /// Returns all configuration errors, in the order in which they were found.
    #[must_use]
    pub fn into_errors(self) -> Vec<ConfigError> {
        self.config_errors
    }

    /// Returns the configuration errors found so far.
    #[must_use]
    pub fn config_errors(&self) -> &[ConfigError] {
        &self.config_errors
    }
}

/// Declares a section: a struct whose fields each have a description, a type and a default. The default `""` means that
/// the setting is unset.
#[macro_export]
macro_rules! settings {
    (
        $(#[doc = $section_doc:literal])+
        pub struct $Section:ident in $section:literal {
            $( $(#[doc = $doc:literal])+ $name:ident: $Type:ty = $default:literal, )+
        }
    ) => {
        $(#[doc = $section_doc])+
        #[derive(Clone, Debug)]
        pub struct $Section {
            $( $(#[doc = $doc])+ pub $name: $Type, )+
        }
        impl $crate::base::settings::Section for $Section {
            const NAME: &'static str = $section;
            const DOC: &'static str = concat!($($section_doc, "\n"),+);
            const FIELDS: &'static [$crate::base::settings::Field] = &[
                $( $crate::base::settings::Field {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n"),+),
                    default: $default,
                    expected: <$Type as $crate::base::settings::Setting>::EXPECTED,
                }, )+
            ];
            fn read(reader: &mut $crate::base::settings::Reader) -> Self {
                Self { $( $name: reader.take($section, stringify!($name), $default), )+ }
            }
        }
        impl Default for $Section {
            fn default() -> Self {
                <Self as $crate::base::settings::Section>::read(&mut $crate::base::settings::Reader::default())
            }
        }
    };
}

/// Declares an enum for a setting that accepts one of a few words.
#[macro_export]
macro_rules! setting_enum {
    (
        $(#[$meta:meta])*
        pub enum $Enum:ident ($expected:literal) { $( $(#[doc = $doc:literal])+ $Variant:ident = $word:literal, )+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $Enum { $( $(#[doc = $doc])+ $Variant, )+ }
        impl $crate::base::settings::Setting for $Enum {
            const EXPECTED: &'static str = $expected;
            fn read(written: &$crate::base::settings::RawValue) -> Option<Self> {
                match written {
                    $crate::base::settings::RawValue::One(word) => Self::from_word(word),
                    $crate::base::settings::RawValue::Many(_) => None,
                }
            }
        }
        impl $Enum {
            /// Returns the variant for `word`; `None` if no variant has this word.
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word {
                    $( $word => Some(Self::$Variant), )+
                    _ => None,
                }
            }
            /// Returns the word for this variant in the configuration.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$Variant => $word, )+ }
            }
        }
    };
}

macro_rules! setting_from_text {
    ($($Type:ty, $expected:literal, $read:expr;)+) => { $(
        impl Setting for $Type {
            const EXPECTED: &'static str = $expected;
            fn read(written: &RawValue) -> Option<Self> {
                let RawValue::One(text) = written else { return None };
                let read: fn(&str) -> Option<Self> = $read;
                read(text)
            }
        }
    )+ };
}

setting_from_text! {
    Duration, "a duration with its unit, such as \"150ms\", \"20s\" or \"15m\"", parse_duration;
    ByteSize, "a size with its unit, such as \"256KiB\" or \"128MiB\"", ByteSize::parse;
    bool, "true or false", |text| text.parse().ok();
    u32, "a whole number, 1 or more", |text| whole_number(text).filter(|number| *number > 0);
    String, "text", |text| Some(text.to_owned());
    Secret, "one line of text", |text| text::value(text).ok().map(|value| Self::new(value.to_owned()));
    PathBuf, "a path", |text| (!text.is_empty()).then(|| Self::from(text));
    SocketAddr, "an address with its port, such as \"127.0.0.1:50051\"", |text| text.parse().ok();
}

/// Parses a whole number in decimal or in any other base that TOML supports: `0x1f`, `0o17`, `0b1`.
fn whole_number(text: &str) -> Option<u32> {
    let based = |prefix, base| text.strip_prefix(prefix).map(|digits| u32::from_str_radix(digits, base));
    let parsed = based("0x", 16).or_else(|| based("0o", 8)).or_else(|| based("0b", 2));
    parsed.unwrap_or_else(|| text.parse()).ok()
}

impl<T: Setting> Setting for Option<T> {
    const EXPECTED: &'static str = T::EXPECTED;
    fn read(written: &RawValue) -> Option<Self> {
        T::read(written).map(Some)
    }
    fn unset() -> Option<Self> {
        Some(None)
    }
}

/// A setting that is a list. A single string is split at its commas, because an environment variable cannot contain a
/// list.
impl<T: Setting> Setting for Vec<T> {
    const EXPECTED: &'static str = T::EXPECTED;
    fn read(written: &RawValue) -> Option<Self> {
        let read = |text: &str| T::read(&RawValue::One(text.trim().to_owned()));
        match written {
            RawValue::One(text) => text.split(',').map(read).collect(),
            RawValue::Many(texts) => texts.iter().map(|text| read(text)).collect(),
        }
    }
    fn unset() -> Option<Self> {
        Some(Self::new())
    }
}
