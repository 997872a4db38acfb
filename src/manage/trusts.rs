//! Trusts: who keys speak for.
//!
//! Never touches a key, except that deleting a trust may delete its keys.

use uuid::Uuid;

use super::{ManageError, Manager};
use crate::{
    record::TrustId,
    store::ledger::{Trust, TrustRef},
};

/// The longest name of a trust, in characters.
const NAME_CHARS_MAX: usize = 100;

/// Which trust `text` means: a UUID is an id, anything else a name.
#[must_use]
pub fn trust_ref(text: &str) -> TrustRef {
    Uuid::parse_str(text).map_or_else(|_| TrustRef::Name(text.to_owned()), |id| TrustRef::Id(TrustId(id)))
}

impl Manager {
    /// Creates a trust.
    ///
    /// # Errors
    /// The name cannot be one or is taken, or the database failed.
    pub async fn create_trust(&mut self, name: &str) -> Result<Trust, ManageError> {
        let printable = !name.is_empty() && name.trim() == name && !name.contains(char::is_control);
        if !printable || name.chars().count() > NAME_CHARS_MAX || Uuid::parse_str(name).is_ok() {
            let expected =
                "1 to 100 characters, none of them a control character, no space around them, and not a UUID";
            return Err(ManageError::Invalid { what: "the name of a trust", expected });
        }
        Ok(self.ledger.create_trust(&self.actor, TrustId(Uuid::new_v4()), name).await?)
    }

    /// Every trust, by name.
    ///
    /// # Errors
    /// The database failed.
    pub async fn trusts(&mut self) -> Result<Vec<Trust>, ManageError> {
        Ok(self.ledger.trusts().await?)
    }

    /// One trust.
    ///
    /// # Errors
    /// There is none, or the database failed.
    pub async fn trust(&mut self, which: &TrustRef) -> Result<Trust, ManageError> {
        Ok(self.ledger.trust(which).await?)
    }

    /// Lets the keys of a trust be granted, or stops that.
    ///
    /// # Errors
    /// There is none, or the database failed.
    pub async fn enable_trust(&mut self, which: &TrustRef, enabled: bool) -> Result<Trust, ManageError> {
        Ok(self.ledger.enable_trust(&self.actor, which, enabled).await?)
    }

    /// Deletes a trust; one that has keys only `with_keys`.
    ///
    /// # Errors
    /// There is none, it has keys, or the database failed.
    pub async fn delete_trust(&mut self, which: &TrustRef, with_keys: bool) -> Result<Trust, ManageError> {
        Ok(self.ledger.delete_trust(&self.actor, which, with_keys).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ext_authz::credential::CredentialSettings, manage::fake::FakeLedger, store::Actor};

    #[test]
    fn a_uuid_is_an_id_and_anything_else_a_name() {
        let id = Uuid::from_u128(7);
        assert_eq!(trust_ref(&id.to_string()), TrustRef::Id(TrustId(id)));
        assert_eq!(trust_ref("acme"), TrustRef::Name("acme".to_owned()));
    }

    #[tokio::test]
    async fn names_that_could_be_confused_are_refused() {
        let ledger = Box::new(FakeLedger::default());
        let mut manager = Manager::new(ledger, Actor("test".to_owned()), CredentialSettings::default()).unwrap();
        for name in ["", " acme", "a\nb", &"n".repeat(101), "00000000-0000-0000-0000-000000000007"] {
            let got = manager.create_trust(name).await;
            assert!(matches!(got, Err(ManageError::Invalid { .. })), "{name:?}: {got:?}");
        }
        assert_eq!(manager.create_trust("Größe & Söhne").await.unwrap().name, "Größe & Söhne");
    }
}
