//! Management: the one place where trusts and keys change. The command line calls it, and whatever manages later will.
//!
//! Never decides a check, and never keeps or shows a key beyond the one moment after it was made.

#[cfg(test)]
mod fake;
pub mod import;
pub mod keys;
pub mod trusts;

use std::{fmt, io, time::Duration};

use crate::{
    clock::Clock,
    credential::{CredentialSettings, Hasher},
    record::Version,
    store::{Actor, Ledger, LedgerError, ledger::Replica},
};

/// How long a caller waits for the replicas to apply a change.
const EFFECT_WAIT_MAX: Duration = Duration::from_millis(1_500);
/// How often it looks meanwhile.
const EFFECT_POLL: Duration = Duration::from_millis(10);

/// Why a change was not made or a question not answered.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The store says why not.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
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

    /// Makes every replica forget what it read before, and waits up to 1.5 s until all of them have.
    ///
    /// # Errors
    /// The database failed; if that was while waiting, the caches are cleared all the same.
    pub async fn clear_caches(&mut self, clock: &impl Clock) -> Result<Effect, ManageError> {
        let version = self.ledger.clear_caches(&self.actor).await?;
        let start = clock.now();
        loop {
            let replicas = self.ledger.replicas().await?;
            let after = clock.now().since(start);
            let count = replicas.len();
            let missing: Vec<_> = replicas.into_iter().filter(|replica| replica.applied < version).collect();
            if missing.is_empty() || after >= EFFECT_WAIT_MAX {
                return Ok(Effect { version, replicas: count, after, missing });
            }
            tokio::time::sleep(EFFECT_POLL).await;
        }
    }
}

/// Where a change is effective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// The version of the change.
    pub version: Version,
    /// How many replicas gave a sign of life lately.
    pub replicas: usize,
    /// How long it took, or how long was waited.
    pub after: Duration,
    /// Those that have not applied it.
    pub missing: Vec<Replica>,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.replicas == 0 {
            return write!(f, "effective: no replica was seen within the last 30 s");
        }
        let applied = self.replicas - self.missing.len();
        write!(f, "effective on {applied}/{} replicas after {} ms", self.replicas, self.after.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::{fake::FakeLedger, *};
    use crate::clock::{DatabaseTime, SystemClock};

    fn replica(id: u128, applied: u64) -> Replica {
        let at = DatabaseTime::from_micros;
        let (id, name) = (uuid::Uuid::from_u128(id), format!("pod-{id}"));
        Replica { id, name, applied: Version(applied), seen_at: at(0), until: at(1) }
    }

    async fn clear(rounds: Vec<Vec<Replica>>) -> Effect {
        let ledger = FakeLedger { rounds, ..FakeLedger::default() };
        let mut manager =
            Manager::new(Box::new(ledger), Actor("test".to_owned()), CredentialSettings::default()).unwrap();
        manager.clear_caches(&SystemClock).await.unwrap()
    }

    #[tokio::test]
    async fn clearing_waits_until_every_replica_has_applied_it() {
        let effect = clear(vec![
            vec![replica(1, 7), replica(2, 6)],
            vec![replica(1, 7), replica(2, 6)],
            vec![replica(1, 9), replica(2, 7)],
        ])
        .await;
        assert_eq!((effect.replicas, effect.missing.len()), (2, 0));
        assert!(effect.after >= EFFECT_POLL && effect.to_string().starts_with("effective on 2/2 replicas after "));
    }

    #[tokio::test]
    async fn a_replica_that_does_not_apply_it_is_named_and_not_waited_for_for_ever() {
        let effect = clear(vec![vec![replica(1, 7), replica(2, 6)]]).await;
        assert_eq!(effect.missing, [replica(2, 6)]);
        assert!(effect.after >= EFFECT_WAIT_MAX && effect.to_string().starts_with("effective on 1/2 replicas after "));
    }

    #[tokio::test]
    async fn with_no_replica_there_is_nothing_to_wait_for() {
        assert_eq!(clear(vec![vec![]]).await.to_string(), "effective: no replica was seen within the last 30 s");
    }
}
