//! Operations on keys: issue, list, revoke and identify. [`Manager::issue_key`] returns a new key to its caller once.
//!
//! The database stores the key's digest and hint, but not the key itself.

use std::time::Duration;

use ipnet::IpNet;
use uuid::Uuid;

use super::{ManageError, Manager};
use crate::{
    base::{clock::DatabaseTime, secret::Secret},
    ext_authz::credential::{
        self,
        format::{self, Form},
    },
    record::{Fingerprint, KeyId, Scheme, is_scope},
    store::ledger::{KeyDetails, NewKey, TrustRef},
};

/// The maximum length of a key's name, in characters.
const NAME_CHARS_MAX: usize = 200;
/// The maximum number of scopes of a key.
const SCOPES_MAX: usize = 64;
/// The maximum number of networks of a key.
const CIDRS_MAX: usize = 64;
/// The maximum validity period of a key: 100 years. A longer period is probably a typing error.
const LIFE_MAX: Duration = Duration::from_hours(100 * 366 * 24);
/// The maximum number of candidate strings in one call to [`Manager::identify_keys`].
const IDENTIFY_MAX: usize = 1_000;

/// The properties of a key to issue.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The trust that the key belongs to.
    pub trust: TrustRef,
    /// The name of the key: its purpose, in the operator's words.
    pub name: Option<String>,
    /// The scopes of the key.
    pub scopes: Vec<String>,
    /// The networks from which the key may be used. An empty list allows any network.
    pub allowed_cidrs: Vec<IpNet>,
    /// How long the key is valid. `None`: the key does not expire.
    pub expires_in: Option<Duration>,
}

/// Selects keys by the pepper with which their digest was computed. "Configured" refers to the configuration of the
/// [`Manager`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PepperFilter {
    /// Keys hashed with the configured current pepper.
    Current,
    /// Keys hashed with one of the configured previous peppers.
    Previous,
    /// Keys whose recorded pepper is not configured.
    Unknown,
    /// Keys whose pepper the database does not record yet.
    Unrecorded,
    /// Keys hashed with the pepper that has this fingerprint.
    Fingerprint(Fingerprint),
}

impl PepperFilter {
    /// Returns true if the filter selects `key`. `known` contains the fingerprints of the configured peppers, the
    /// current one first.
    fn passes(self, key: &KeyDetails, known: &[Fingerprint]) -> bool {
        let Some(pepper) = key.pepper else {
            return self == Self::Unrecorded && key.scheme == Scheme::Hmac;
        };
        match self {
            Self::Current => known.first() == Some(&pepper),
            Self::Previous => known.iter().skip(1).any(|one| *one == pepper),
            Self::Unknown => !known.contains(&pepper),
            Self::Unrecorded => false,
            Self::Fingerprint(one) => one == pepper,
        }
    }
}

/// A newly issued key.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The stored data of the key.
    pub key: KeyDetails,
    /// The key itself, which is not stored.
    pub secret: Secret,
}

/// The state of a key: active, or the reason for its denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyState {
    /// Checks grant the key.
    Active,
    /// The key was revoked.
    Revoked,
    /// The key's `expires_at` has passed.
    Expired,
    /// The key's `not_before` is in the future.
    NotYetValid,
    /// The key's trust is disabled.
    TrustDisabled,
}

impl KeyState {
    /// Returns the state of `key` at the time `now`, by the database's clock.
    #[must_use]
    pub(crate) fn of(key: &KeyDetails, now: DatabaseTime) -> Self {
        if key.revoked_at.is_some() {
            Self::Revoked
        } else if key.expires_at.is_some_and(|end| end <= now) {
            Self::Expired
        } else if key.not_before.is_some_and(|start| now < start) {
            Self::NotYetValid
        } else if key.trust_enabled {
            Self::Active
        } else {
            Self::TrustDisabled
        }
    }

    /// Returns the name of the state, as commands print it.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Revoked => "revoked",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::TrustDisabled => "trust_disabled",
        }
    }
}

/// The result for one string that may be a key. Does not contain the string.
#[derive(Clone, Debug)]
pub struct Identified {
    /// The number of the line that contains the string, from 1.
    pub line: usize,
    /// The form of the string.
    pub form: Form,
    /// The stored key, if the string is a stored key.
    pub key: Option<KeyDetails>,
}

impl Manager {
    /// Generates a key and stores its digest.
    ///
    /// # Errors
    /// `wanted` is invalid, the trust does not exist, or the database failed.
    pub async fn issue_key(&mut self, wanted: Wanted) -> Result<Issued, ManageError> {
        check(&wanted)?;
        let secret = format::generate(&self.credential.prefix).map_err(ManageError::Randomness)?;
        let Wanted { trust, name, mut scopes, allowed_cidrs, expires_in } = wanted;
        scopes.sort_unstable();
        scopes.dedup();
        let bytes = secret.expose().as_bytes();
        let new = NewKey {
            id: KeyId(Uuid::now_v7()),
            digest: self.hasher.current(bytes),
            older: Vec::new(), // a newly generated key cannot be stored already
            made: self.hasher.made(),
            hint: format::hint(&self.credential.prefix, bytes),
            name,
            scopes,
            allowed_cidrs: allowed_cidrs.iter().map(IpNet::trunc).collect(),
            not_before: None,
            expires_in,
        };
        let key = self.ledger.add_key(&self.actor, &trust, new).await?;
        Ok(Issued { key, secret })
    }

    /// Records the configured pepper as the pepper for new keys. Returns the fingerprints of this pepper and of the
    /// pepper recorded before it.
    ///
    /// # Errors
    /// No pepper is configured, or the database failed.
    pub async fn use_pepper(&mut self) -> Result<(Fingerprint, Option<Fingerprint>), ManageError> {
        let pepper = self.hasher.made().fingerprint().ok_or(ManageError::Invalid {
            what: "credential.pepper_file, or credential.pepper,",
            expected: "set to the pepper for new keys",
        })?;
        Ok((pepper, self.ledger.use_pepper(&self.actor, pepper).await?))
    }

    /// Lists the keys of one trust, or of all trusts, newest first. If `pepper` is given, lists only the keys that this
    /// filter selects. Also returns the current time by the database's clock, which determines the state of each key.
    ///
    /// # Errors
    /// The trust does not exist, or the database failed.
    pub async fn keys(
        &mut self,
        trust: Option<&TrustRef>,
        pepper: Option<PepperFilter>,
    ) -> Result<(Vec<KeyDetails>, DatabaseTime), ManageError> {
        let mut keys = self.ledger.keys(trust).await?;
        keys.retain(|key| pepper.is_none_or(|pepper| pepper.passes(key, self.hasher.fingerprints())));
        Ok((keys, self.ledger.now().await?))
    }

    /// Returns one key, and the current time by the database's clock.
    ///
    /// # Errors
    /// The key does not exist, or the database failed.
    pub async fn key(&mut self, id: KeyId) -> Result<(KeyDetails, DatabaseTime), ManageError> {
        Ok((self.ledger.key(id).await?, self.ledger.now().await?))
    }

    /// Revokes a key permanently. A key that is already revoked keeps its time of revocation. Also returns the current
    /// time by the database's clock.
    ///
    /// # Errors
    /// The key does not exist, or the database failed.
    pub async fn revoke_key(&mut self, id: KeyId) -> Result<(KeyDetails, DatabaseTime), ManageError> {
        Ok((self.ledger.revoke_key(&self.actor, id).await?, self.ledger.now().await?))
    }

    /// Looks up each string in `text` that may be a key: in each line, the strings with the form of a trustgate key, or
    /// the whole line if there are none. Also returns the current time by the database's clock.
    ///
    /// # Errors
    /// The input has too many such strings, or the database failed.
    pub async fn identify_keys(&mut self, text: &str) -> Result<(Vec<Identified>, DatabaseTime), ManageError> {
        let prefix = self.credential.prefix.clone();
        let strings: Vec<_> = text
            .lines()
            .enumerate()
            .flat_map(|(index, line)| key_like(&prefix, line).into_iter().map(move |string| (index + 1, string)))
            .collect();
        if strings.len() > IDENTIFY_MAX {
            return Err(ManageError::Invalid { what: "the number of keys in the input", expected: "at most 1000" });
        }
        let mut found = Vec::with_capacity(strings.len());
        for (line, string) in strings {
            let digests = self.hasher.digests(self.hasher.current(string), string);
            let key = self.ledger.identify(&digests).await?;
            found.push(Identified { line, form: format::form(&prefix, string), key });
        }
        Ok((found, self.ledger.now().await?))
    }
}

/// Returns the substrings of `line` that may be keys, as described in [`Manager::identify_keys`].
fn key_like<'l>(prefix: &credential::Prefix, line: &'l str) -> Vec<&'l [u8]> {
    let start = format!("{}_", prefix.as_str());
    let ours: Vec<_> = line
        .match_indices(&start)
        .filter_map(|(at, _)| line.as_bytes().get(at..at + start.len() + format::BODY_CHARS))
        .filter(|string| format::form(prefix, string) == Form::Ours)
        .collect();
    let whole = line.trim().as_bytes();
    let lengths = credential::KEY_BYTES_MIN..=credential::KEY_BYTES_MAX;
    if ours.is_empty() && lengths.contains(&whole.len()) && whole.iter().all(u8::is_ascii_graphic) {
        return vec![whole];
    }
    ours
}

fn check(wanted: &Wanted) -> Result<(), ManageError> {
    let invalid = |what, expected| Err(ManageError::Invalid { what, expected });
    let name_fits = |name: &String| {
        (1..=NAME_CHARS_MAX).contains(&name.chars().count()) && name.trim() == name && !name.contains(char::is_control)
    };
    if !wanted.name.as_ref().is_none_or(name_fits) {
        return invalid(
            "the name of a key",
            "1 to 200 characters without control characters, with no space at either end",
        );
    }
    if wanted.scopes.len() > SCOPES_MAX || !wanted.scopes.iter().all(|scope| is_scope(scope)) {
        return invalid(
            "the scopes of a key",
            "at most 64 scopes, each of 1 to 128 visible ASCII characters other than \", \\ and the comma",
        );
    }
    if wanted.allowed_cidrs.len() > CIDRS_MAX {
        return invalid("the number of networks of a key", "at most 64");
    }
    if wanted.expires_in.is_some_and(|life| life.is_zero() || life > LIFE_MAX) {
        return invalid("the validity period of a key", "longer than zero and at most 100 years");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::settings::{RawValue, Setting},
        ext_authz::credential::CredentialSettings,
        manage::fixture::Fixture,
    };

    async fn fixture() -> Fixture {
        let pepper = Setting::read(&RawValue::One("a pepper of some length".to_owned()));
        let credential = CredentialSettings { pepper, ..CredentialSettings::default() };
        Fixture::new(credential).await
    }

    fn wanted() -> Wanted {
        let trust = TrustRef::Name("acme".to_owned());
        Wanted { trust, name: None, scopes: Vec::new(), allowed_cidrs: Vec::new(), expires_in: None }
    }

    #[tokio::test]
    async fn leaked_key_is_identified_inside_other_text() {
        let mut fixture = fixture().await;
        let manager = &mut fixture.manager;
        let issued = manager.issue_key(wanted()).await.unwrap();
        assert_eq!((issued.key.scheme, issued.key.hint.as_str()), (Scheme::Hmac, &issued.secret.expose()[..8]));
        let key = issued.secret.expose();
        for (text, line) in [
            (key.to_owned(), 1),
            (format!("\n  {key}\r\n"), 2),
            (format!("curl -H 'X-Api-Key: {key}' tg_ http://host/?k=tg_nonsense"), 1),
            (format!("tg_{key}{key}x"), 1),
        ] {
            let (found, _) = manager.identify_keys(&text).await.unwrap();
            assert_eq!(found[0].line, line, "{text}");
            assert_eq!(found[0].key.as_ref().map(|key| key.id), Some(issued.key.id), "{text}");
        }
        for text in ["", "short", "a-foreign-key-not-issued", "two words that are no key"] {
            let (found, _) = manager.identify_keys(text).await.unwrap();
            assert!(found.iter().all(|one| one.key.is_none()), "{text}");
        }
    }

    #[tokio::test]
    async fn invalid_key_properties_are_rejected() {
        let mut fixture = fixture().await;
        let manager = &mut fixture.manager;
        for (name, bad) in [
            ("name", Wanted { name: Some("a\u{1b}b".to_owned()), ..wanted() }),
            ("empty scope", Wanted { scopes: vec![String::new()], ..wanted() }),
            ("scope with space", Wanted { scopes: vec!["a b".to_owned()], ..wanted() }),
            ("scopes", Wanted { scopes: vec!["a".to_owned(); 65], ..wanted() }),
            ("no life", Wanted { expires_in: Some(Duration::ZERO), ..wanted() }),
            ("long life", Wanted { expires_in: Some(Duration::MAX), ..wanted() }),
        ] {
            let got = manager.issue_key(bad).await;
            assert!(matches!(got, Err(ManageError::Invalid { .. })), "{name}");
        }
        let good = Wanted { scopes: ["b", "a", "b"].map(str::to_owned).to_vec(), ..wanted() };
        assert_eq!(manager.issue_key(good).await.unwrap().key.scopes, ["a", "b"]);
    }

    #[tokio::test]
    async fn key_is_active_from_not_before_until_just_before_expires_at() {
        let key = fixture().await.manager.issue_key(wanted()).await.unwrap().key;
        let at = DatabaseTime::from_micros;
        let limited = KeyDetails { not_before: Some(at(10)), expires_at: Some(at(20)), ..key.clone() };
        for (key, now, want) in [
            (&limited, 9, KeyState::NotYetValid),
            (&limited, 10, KeyState::Active),
            (&limited, 19, KeyState::Active),
            (&limited, 20, KeyState::Expired),
            (&KeyDetails { revoked_at: Some(at(1)), ..limited.clone() }, 10, KeyState::Revoked),
            (&KeyDetails { trust_enabled: false, ..limited.clone() }, 10, KeyState::TrustDisabled),
        ] {
            assert_eq!(KeyState::of(key, at(now)), want, "{now}");
        }
    }
}
