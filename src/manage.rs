//! Management: the one place where trusts and keys change. The command line calls it, and whatever manages later will.
//!
//! Never decides a check, and never keeps or shows a key beyond the one moment after it was made.

pub mod deny;
#[cfg(test)]
mod fake;
pub mod import;
pub mod keys;
pub mod trusts;

use std::{fmt, io, time::Duration};

use crate::{
    base::clock::Clock,
    ext_authz::credential::{CredentialSettings, Hasher},
    record::Version,
    store::{Actor, Ledger, StoreError, ledger::Replica},
};

/// How often replicas are looked at while they are waited for.
const EFFECT_POLL: Duration = Duration::from_millis(10);

/// Why a change was not made or a question not answered.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The store says why not.
    #[error(transparent)]
    Ledger(#[from] StoreError),
    /// What was given cannot be used as what it was given for.
    #[error("{what} must be {expected}")]
    Invalid {
        /// What was given, as a name of the thing: "the name of a trust".
        what: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// The operating system gives no randomness to make a key from.
    #[error("the operating system gives no randomness: {0}")]
    Randomness(getrandom::Error),
    /// The keys to import cannot be read.
    #[error("cannot read the keys to import: {0}")]
    Read(#[from] io::Error),
    /// Lines to import that are not what they should be. Nothing was stored.
    #[error("{0}")]
    BadLines(import::BadLines),
}

/// Management in somebody's name.
pub struct Manager {
    ledger: Box<dyn Ledger>,
    actor: Actor,
    credential: CredentialSettings,
    hasher: Hasher,
}

impl Manager {
    /// Management of `ledger` in the name of `actor`; keys are made and hashed as `credential` says.
    ///
    /// # Errors
    /// What the operating system says of a pepper file that cannot be read.
    pub fn new(ledger: Box<dyn Ledger>, actor: Actor, credential: CredentialSettings) -> io::Result<Self> {
        let hasher = credential.hasher()?;
        Ok(Self { ledger, actor, credential, hasher })
    }

    /// Makes every replica forget what it read before, and waits, as [`Self::effect`] does, until all of them have.
    ///
    /// # Errors
    /// The database failed; if that was while waiting, the caches are cleared all the same.
    pub async fn clear_caches(&mut self, clock: &impl Clock, wait_max: Duration) -> Result<Effect, ManageError> {
        let version = self.ledger.clear_caches(&self.actor).await?;
        self.effect_of(version, clock, wait_max).await
    }

    /// Where everything that was committed before is effective: waits until every replica that may still grant what it
    /// holds has applied it, but for `wait_max` at most.
    ///
    /// # Errors
    /// The database failed, so that this is not known; what was committed is committed.
    pub async fn effect(&mut self, clock: &impl Clock, wait_max: Duration) -> Result<Effect, ManageError> {
        let version = self.ledger.newest().await?;
        self.effect_of(version, clock, wait_max).await
    }

    /// Replicas that may still grant what they hold.
    ///
    /// # Errors
    /// The database failed.
    pub async fn replicas(&mut self) -> Result<Vec<Replica>, ManageError> {
        Ok(self.ledger.replicas().await?)
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

/// Where a change is effective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// The version of the change.
    pub version: Version,
    /// How many replicas may still grant what they hold.
    pub replicas: usize,
    /// How long it took, or how long was waited.
    pub after: Duration,
    /// Those that have not applied it.
    pub missing: Vec<Replica>,
}

impl Effect {
    /// On how many replicas it is effective.
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
                ";\nnot yet on {name} ({id}): it grants nothing it holds after {until} unless it is heard of again"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::fake::FakeLedger;
    use super::*;
    use crate::base::clock::{DatabaseTime, SystemClock};

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
    async fn a_change_is_waited_for_until_every_replica_has_applied_it() {
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
    async fn replicas_that_do_not_apply_it_are_named_with_their_last_moment() {
        let effect = manager(vec![vec![replica(1, 7), replica(2, 6), replica(3, 0)]]).effect(&SystemClock, WAIT).await;
        let effect = effect.unwrap();
        assert_eq!((effect.applied(), &*effect.missing), (1, &[replica(2, 6), replica(3, 0)][..]));
        assert!(effect.after >= WAIT);
        let line = |id: u128| {
            let id = uuid::Uuid::from_u128(id);
            format!(
                "not yet on pod-{} ({id}): it grants nothing it holds after 1970-01-01T00:00:01Z unless it is heard of \
                 again",
                id.as_u128()
            )
        };
        let first = format!("effective on 1/3 replicas after {} ms", effect.after.as_millis());
        assert_eq!(effect.to_string(), [first, line(2), line(3)].join(";\n"));
    }

    #[tokio::test]
    async fn a_replica_that_is_no_longer_heard_of_is_not_waited_for() {
        let mut manager = manager(vec![vec![replica(1, 7), replica(2, 6)], vec![replica(1, 7)]]);
        let effect = manager.effect(&SystemClock, Duration::from_mins(1)).await.unwrap();
        assert!(effect.to_string().starts_with("effective on 1/1 replicas after "), "{effect}");
    }

    #[tokio::test]
    async fn with_no_replica_there_is_nothing_to_wait_for() {
        let effect = manager(vec![vec![]]).effect(&SystemClock, WAIT).await.unwrap();
        assert_eq!(effect.to_string(), "effective: no replica is running");
    }
}
