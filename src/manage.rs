//! Management: the operations that change trusts and keys, for the command line and the canary.
//!
//! It takes no part in checks. It returns a new key once and does not keep it.

pub mod deny;
#[cfg(test)]
mod fake;
pub mod import;
pub mod keys;
pub mod trusts;

use std::{fmt, io, time::Duration};

use crate::{
    base::clock::{Clock, DatabaseTime},
    ext_authz::credential::{CredentialSettings, Hasher},
    record::Version,
    store::{Actor, Ledger, StoreError, ledger::Replica},
};

/// The interval at which a command reads the list of replicas while it waits for them.
const EFFECT_POLL: Duration = Duration::from_millis(10);

/// Why a change was not made, or a query failed.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The store rejected the change, or failed.
    #[error(transparent)]
    Ledger(#[from] StoreError),
    /// An argument is invalid.
    #[error("{what} must be {expected}")]
    Invalid {
        /// The argument: "the name of a trust".
        what: &'static str,
        /// A description of valid values.
        expected: &'static str,
    },
    /// The operating system returned no random bytes for a key.
    #[error("cannot generate a key: the operating system returned no random bytes: {0}")]
    Randomness(getrandom::Error),
    /// The keys to import cannot be read.
    #[error("cannot read the keys to import: {0}")]
    Read(#[from] io::Error),
    /// The input of an import has invalid lines. Nothing was stored.
    #[error("{0}")]
    BadLines(import::BadLines),
}

/// Runs management operations on behalf of an actor.
pub struct Manager {
    ledger: Box<dyn Ledger>,
    actor: Actor,
    credential: CredentialSettings,
    hasher: Hasher,
}

impl Manager {
    /// Manages `ledger` on behalf of `actor`; `credential` sets how keys are generated and hashed.
    ///
    /// # Errors
    /// A pepper file cannot be read.
    pub fn new(ledger: Box<dyn Ledger>, actor: Actor, credential: CredentialSettings) -> io::Result<Self> {
        let hasher = credential.hasher()?;
        Ok(Self { ledger, actor, credential, hasher })
    }

    /// Makes all replicas discard their cached data and waits, as [`Self::effect`] does, until they have.
    ///
    /// # Errors
    /// The database failed. If it failed during the wait, the replicas discard their cached data nevertheless.
    pub async fn clear_caches(&mut self, clock: &impl Clock, wait_max: Duration) -> Result<Effect, ManageError> {
        let version = self.ledger.clear_caches(&self.actor).await?;
        self.effect_of(version, clock, wait_max).await
    }

    /// Waits, at most `wait_max`, until each replica that may still grant keys from its cache has applied all changes
    /// that were committed before this call. Returns which replicas have.
    ///
    /// # Errors
    /// The database failed, so the effect is unknown. The changes stay committed.
    pub async fn effect(&mut self, clock: &impl Clock, wait_max: Duration) -> Result<Effect, ManageError> {
        let version = self.ledger.newest().await?;
        self.effect_of(version, clock, wait_max).await
    }

    /// The time of the database's clock.
    ///
    /// # Errors
    /// The database failed.
    pub async fn now(&mut self) -> Result<DatabaseTime, ManageError> {
        Ok(self.ledger.now().await?)
    }

    async fn effect_of(
        &mut self,
        version: Version,
        clock: &impl Clock,
        wait_max: Duration,
    ) -> Result<Effect, ManageError> {
        let start = clock.now();
        loop {
            let replicas = self.ledger.replicas().await?;
            let after = clock.now().since(start);
            let count = replicas.len();
            let missing: Vec<_> = replicas.into_iter().filter(|replica| replica.applied < version).collect();
            if missing.is_empty() || after >= wait_max {
                return Ok(Effect { version, replicas: count, after, missing });
            }
            tokio::time::sleep(EFFECT_POLL.min(wait_max.saturating_sub(after))).await;
        }
    }
}

/// The replicas on which a change is effective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// The version of the change.
    pub version: Version,
    /// The number of replicas that may still grant keys from their caches.
    pub replicas: usize,
    /// The time that the command waited.
    pub after: Duration,
    /// The replicas that have not applied the change.
    pub missing: Vec<Replica>,
}

impl Effect {
    /// The number of replicas on which the change is effective.
    #[must_use]
    pub const fn applied(&self) -> usize {
        self.replicas - self.missing.len()
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.replicas == 0 {
            return write!(f, "effective: no replica is running");
        }
        write!(f, "effective on {}/{} replicas after {} ms", self.applied(), self.replicas, self.after.as_millis())?;
        for Replica { id, name, until, .. } in &self.missing {
            write!(
                f,
                ";\nnot yet on {name} ({id}): it grants no cached key after {until}, unless it sends another heartbeat"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::fake::FakeLedger;
    use super::*;
    use crate::base::clock::SystemClock;

    fn replica(id: u128, applied: u64) -> Replica {
        let at = DatabaseTime::from_micros;
        let (id, name) = (uuid::Uuid::from_u128(id), format!("pod-{id}"));
        Replica { id, name, applied: Version(applied), seen_at: at(0), until: at(1_000_000) }
    }

    fn manager(rounds: Vec<Vec<Replica>>) -> Manager {
        let ledger = FakeLedger { rounds, ..FakeLedger::default() };
        Manager::new(Box::new(ledger), Actor("test".to_owned()), CredentialSettings::default()).unwrap()
    }

    const WAIT: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn effect_waits_until_every_replica_has_applied_the_change() {
        let rounds = || {
            vec![
                vec![replica(1, 7), replica(2, 6)],
                vec![replica(1, 7), replica(2, 6)],
                vec![replica(1, 9), replica(2, 7)],
            ]
        };
        let waited = manager(rounds()).effect(&SystemClock, Duration::from_mins(1)).await.unwrap();
        let cleared = manager(rounds()).clear_caches(&SystemClock, Duration::from_mins(1)).await.unwrap();
        for effect in [waited, cleared] {
            assert_eq!((effect.version, effect.replicas, effect.applied()), (Version(7), 2, 2));
            assert!(effect.after >= EFFECT_POLL, "{effect}");
            assert_eq!(effect.to_string(), format!("effective on 2/2 replicas after {} ms", effect.after.as_millis()));
        }
    }

    #[tokio::test]
    async fn effect_lists_replicas_that_have_not_applied_the_change() {
        let effect = manager(vec![vec![replica(1, 7), replica(2, 6), replica(3, 0)]]).effect(&SystemClock, WAIT).await;
        let effect = effect.unwrap();
        assert_eq!((effect.applied(), &*effect.missing), (1, &[replica(2, 6), replica(3, 0)][..]));
        assert!(effect.after >= WAIT);
        let line = |id: u128| {
            let id = uuid::Uuid::from_u128(id);
            format!(
                "not yet on pod-{} ({id}): it grants no cached key after 1970-01-01T00:00:01Z, unless it sends another \
                 heartbeat",
                id.as_u128()
            )
        };
        let first = format!("effective on 1/3 replicas after {} ms", effect.after.as_millis());
        assert_eq!(effect.to_string(), [first, line(2), line(3)].join(";\n"));
    }

    #[tokio::test]
    async fn effect_does_not_wait_for_a_replica_that_is_no_longer_listed() {
        let mut manager = manager(vec![vec![replica(1, 7), replica(2, 6)], vec![replica(1, 7)]]);
        let effect = manager.effect(&SystemClock, Duration::from_mins(1)).await.unwrap();
        assert!(effect.to_string().starts_with("effective on 1/1 replicas after "), "{effect}");
    }

    #[tokio::test]
    async fn effect_without_replicas_says_that_none_is_running() {
        let effect = manager(vec![vec![]]).effect(&SystemClock, WAIT).await.unwrap();
        assert_eq!(effect.to_string(), "effective: no replica is running");
    }
}
