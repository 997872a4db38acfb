//! Management: the operations that change trusts and keys, for the command line and the canary.
//!
//! Checks do not use this module. The caller receives a newly issued key once; the module does not keep it.

pub(crate) mod deny;
#[cfg(test)]
mod fixture;
pub(crate) mod import;
pub(crate) mod keys;
pub(crate) mod trusts;

use std::{fmt, io, time::Duration};

use crate::{
    base::clock::{Clock, DatabaseTime},
    ext_authz::credential::{CredentialSettings, Hasher},
    record::Version,
    store::{Actor, Ledger, StoreError, ledger::ReplicaStatus},
};

/// The interval at which a command reads the list of replicas while it waits for them to apply a change.
const EFFECT_POLL: Duration = Duration::from_millis(10);

/// Why a management operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The store rejected the change, or failed.
    #[error(transparent)]
    Ledger(#[from] StoreError),
    /// An argument is invalid.
    #[error("{what} must be {expected}")]
    Invalid {
        /// The name of the argument, such as "the name of a trust".
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
    ledger: Ledger,
    actor: Actor,
    credential: CredentialSettings,
    hasher: Hasher,
}

impl Manager {
    /// Creates a manager that changes `ledger` on behalf of `actor`. `credential` sets how keys are generated and
    /// hashed.
    ///
    /// # Errors
    /// A pepper file cannot be read.
    pub fn new(ledger: Ledger, actor: Actor, credential: CredentialSettings) -> io::Result<Self> {
        let hasher = credential.hasher()?;
        Ok(Self { ledger, actor, credential, hasher })
    }

    /// Makes all replicas discard their cached data, and waits for them to do so, as [`Self::effect`] does.
    ///
    /// # Errors
    /// The database failed. If it failed during the wait, the replicas still discard their cached data.
    pub async fn clear_caches(&mut self, clock: &impl Clock, wait_max: Duration) -> Result<Effect, ManageError> {
        let version = self.ledger.clear_caches(&self.actor).await?;
        self.effect_of(version, clock, wait_max).await
    }

    /// Waits up to `wait_max` for each replica that may still grant keys from its cache to apply all changes that were
    /// committed before this call. Returns which replicas have applied them.
    ///
    /// # Errors
    /// The database failed, so the effect is unknown. The changes stay committed.
    pub async fn effect(&mut self, clock: &impl Clock, wait_max: Duration) -> Result<Effect, ManageError> {
        let version = self.ledger.newest().await?;
        self.effect_of(version, clock, wait_max).await
    }

    /// Returns the current time by the database's clock.
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

/// The effect of a change: which replicas have applied it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// The version that the replicas must have applied.
    pub version: Version,
    /// The number of replicas that may still grant keys from their caches.
    pub replicas: usize,
    /// How long the command waited.
    pub after: Duration,
    /// The replicas that have not applied the change.
    pub missing: Vec<ReplicaStatus>,
}

impl Effect {
    /// Returns the number of replicas on which the change is effective.
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
        for ReplicaStatus { id, name, until, .. } in &self.missing {
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
    use super::{fixture::Fixture, *};
    use crate::base::clock::SystemClock;

    const WAIT: Duration = Duration::from_millis(100);
    const MINUTE: Duration = Duration::from_mins(1);
    /// A version newer than any change that a test makes.
    const NEWER: Version = Version(1_000_000);
    /// A version older than any change that a test makes.
    const OLDER: Version = Version(1);

    async fn fixture() -> Fixture {
        Fixture::new(CredentialSettings::default()).await
    }

    #[tokio::test]
    async fn effect_waits_until_every_replica_has_applied_the_change() {
        for clears_caches in [false, true] {
            let mut fixture = fixture().await;
            fixture.replicas.heartbeat(1, NEWER, MINUTE).await;
            fixture.replicas.heartbeat(2, OLDER, MINUTE).await;
            let Fixture { manager, replicas, .. } = &mut fixture;
            let change = async {
                if clears_caches {
                    manager.clear_caches(&SystemClock, MINUTE).await
                } else {
                    manager.effect(&SystemClock, MINUTE).await
                }
            };
            let applies = async {
                tokio::time::sleep(WAIT).await;
                replicas.heartbeat(2, NEWER, MINUTE).await;
            };
            let (effect, ()) = tokio::join!(change, applies);
            let effect = effect.unwrap();
            assert_eq!(effect.version, fixture.manager.ledger.newest().await.unwrap());
            assert_eq!((effect.replicas, effect.applied()), (2, 2));
            assert!(effect.after >= EFFECT_POLL, "{effect}");
            assert_eq!(effect.to_string(), format!("effective on 2/2 replicas after {} ms", effect.after.as_millis()));
        }
    }

    #[tokio::test]
    async fn effect_lists_replicas_that_have_not_applied_the_change() {
        let mut fixture = fixture().await;
        for (id, applied) in [(1, NEWER), (2, OLDER), (3, OLDER)] {
            fixture.replicas.heartbeat(id, applied, MINUTE).await;
        }
        let effect = fixture.manager.effect(&SystemClock, WAIT).await.unwrap();
        let missing: Vec<_> = effect.missing.iter().map(|replica| (replica.id.as_u128(), replica.applied)).collect();
        assert_eq!((effect.applied(), &*missing), (1, &[(2, OLDER), (3, OLDER)][..]));
        assert!(effect.after >= WAIT);
        let line = |ReplicaStatus { id, name, until, .. }: &ReplicaStatus| {
            format!(
                "not yet on {name} ({id}): it grants no cached key after {until}, unless it sends another heartbeat"
            )
        };
        let first = format!("effective on 1/3 replicas after {} ms", effect.after.as_millis());
        assert_eq!(effect.to_string(), [first, line(&effect.missing[0]), line(&effect.missing[1])].join(";\n"));
    }

    #[tokio::test]
    async fn effect_does_not_wait_for_a_replica_that_is_no_longer_listed() {
        let mut fixture = fixture().await;
        fixture.replicas.heartbeat(1, NEWER, MINUTE).await;
        fixture.replicas.heartbeat(2, OLDER, Duration::from_secs(1)).await;
        assert_eq!(fixture.manager.ledger.replicas().await.unwrap().len(), 2);
        let effect = fixture.manager.effect(&SystemClock, MINUTE).await.unwrap();
        assert!(effect.to_string().starts_with("effective on 1/1 replicas after "), "{effect}");
    }

    #[tokio::test]
    async fn effect_without_replicas_reports_that_none_is_running() {
        let effect = fixture().await.manager.effect(&SystemClock, WAIT).await.unwrap();
        assert_eq!(effect.to_string(), "effective: no replica is running");
    }
}
