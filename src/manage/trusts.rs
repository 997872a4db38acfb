//! Operations on trusts, the tenant organisations that keys belong to.
//!
//! These operations do not change keys, except that deleting a trust can delete its keys.

use uuid::Uuid;

use super::{ManageError, Manager};
use crate::{
    record::TrustId,
    store::ledger::{Trust, TrustRef},
};

/// The maximum length of a trust's name, in characters.
const NAME_CHARS_MAX: usize = 100;

/// Parses a reference to a trust: a UUID is an id, any other string is a name.
#[must_use]
pub(crate) fn trust_ref(text: &str) -> TrustRef {
    Uuid::parse_str(text).map_or_else(|_| TrustRef::Name(text.to_owned()), |id| TrustRef::Id(TrustId(id)))
}

impl Manager {
    /// Creates a trust.
    ///
    /// # Errors
    /// The name is invalid or taken, or the database failed.
    pub async fn create_trust(&mut self, name: &str) -> Result<Trust, ManageError> {
        let printable = !name.is_empty() && name.trim() == name && !name.contains(char::is_control);
        if !printable || name.chars().count() > NAME_CHARS_MAX || Uuid::parse_str(name).is_ok() {
            let expected =
                "1 to 100 characters without control characters, with no space at either end, and not a UUID";
            return Err(ManageError::Invalid { what: "the name of a trust", expected });
        }
        Ok(self.ledger.create_trust(&self.actor, TrustId(Uuid::new_v4()), name).await?)
    }

    /// Returns all trusts, ordered by name.
    ///
    /// # Errors
    /// The database failed.
    pub async fn trusts(&mut self) -> Result<Vec<Trust>, ManageError> {
        Ok(self.ledger.trusts().await?)
    }

    /// Returns one trust.
    ///
    /// # Errors
    /// The trust does not exist, or the database failed.
    pub async fn trust(&mut self, which: &TrustRef) -> Result<Trust, ManageError> {
        Ok(self.ledger.trust(which).await?)
    }

    /// Enables or disables a trust. The keys of a disabled trust are denied.
    ///
    /// # Errors
    /// The trust does not exist, or the database failed.
    pub async fn enable_trust(&mut self, which: &TrustRef, enabled: bool) -> Result<Trust, ManageError> {
        Ok(self.ledger.enable_trust(&self.actor, which, enabled).await?)
    }

    /// Deletes a trust. If the trust has keys, deletes them if `with_keys` is set, and fails otherwise.
    ///
    /// # Errors
    /// The trust does not exist, it has keys and `with_keys` is not set, or the database failed.
    pub async fn delete_trust(&mut self, which: &TrustRef, with_keys: bool) -> Result<Trust, ManageError> {
        Ok(self.ledger.delete_trust(&self.actor, which, with_keys).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ext_authz::credential::CredentialSettings, manage::fixture::Fixture};

    #[test]
    fn trust_ref_parses_a_uuid_as_an_id_and_any_other_string_as_a_name() {
        let id = Uuid::from_u128(7);
        assert_eq!(trust_ref(&id.to_string()), TrustRef::Id(TrustId(id)));
        assert_eq!(trust_ref("acme"), TrustRef::Name("acme".to_owned()));
    }

    #[tokio::test]
    async fn invalid_trust_names_are_rejected() {
        let mut fixture = Fixture::new(CredentialSettings::default()).await;
        let manager = &mut fixture.manager;
        for name in ["", " acme", "a\nb", &"n".repeat(101), "00000000-0000-0000-0000-000000000007"] {
            let got = manager.create_trust(name).await;
            assert!(matches!(got, Err(ManageError::Invalid { .. })), "{name:?}: {got:?}");
        }
        assert_eq!(manager.create_trust("Größe & Söhne").await.unwrap().name, "Größe & Söhne");
    }
}
