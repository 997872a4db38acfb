//! The problems that keep changes from being recorded.

/// A problem that keeps changes from being recorded. The message includes the remedy, unless the remedy is obvious.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrackingProblem {
    /// A problem with the attached table. Only `trustgate attach` repairs it, because only the owner of that table can
    /// change its triggers.
    #[error("{0}{ATTACH}")]
    AttachedTable(String),
    /// A problem with our own tables on PostgreSQL.
    #[error("{0}")]
    OwnTables(String),
    /// A trigger on our tables in SQLite is missing.
    #[error("the trigger {0} is missing: run `trustgate migrate`")]
    MissingTrigger(&'static str),
    /// A trigger on our tables in SQLite differs from the trigger that this release creates.
    #[error("the trigger {0} was altered: run `trustgate migrate`")]
    AlteredTrigger(&'static str),
    /// Our tables in SQLite have a trigger that another program created.
    #[error("the trigger {0:?} is not one of trustgate's: drop it, because it can hide changes from the change log")]
    OtherTrigger(String),
    /// Our tables in SQLite have a unique index that another program created.
    #[error(
        "the unique index {0:?} is not one of trustgate's: drop it, because REPLACE could delete rows without a record \
         in the change log"
    )]
    OtherUniqueIndex(String),
}

/// The end of the messages about problems with the attached table. The function `gaps` in the database contains this
/// string.
pub(crate) const ATTACH: &str = ": run `trustgate attach`";

impl TrackingProblem {
    /// Parses a message from the function `gaps`. That function returns only strings, and it must not change, because
    /// each release that uses the same tables compares the function with its own version. So only the end of a message
    /// shows that the problem concerns the attached table.
    pub(crate) fn of_gaps(message: String) -> Self {
        match message.strip_suffix(ATTACH) {
            Some(problem) => Self::AttachedTable(problem.to_owned()),
            None => Self::OwnTables(message),
        }
    }

    /// Returns true if only `trustgate attach` can repair the problem.
    pub(crate) const fn needs_attach(&self) -> bool {
        matches!(self, Self::AttachedTable(_))
    }
}

/// Why the change log could not be recorded as intact.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotIntact {
    /// A problem that keeps changes from being recorded was found.
    #[error(transparent)]
    Problem(#[from] TrackingProblem),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_from_the_database_are_reported_unchanged() {
        let missing = "the trigger trustgate_changed on table public.trust is missing";
        for (message, needs_attach) in [(missing.to_owned(), false), (format!("{missing}{ATTACH}"), true)] {
            let problem = TrackingProblem::of_gaps(message.clone());
            assert_eq!((problem.to_string(), problem.needs_attach()), (message, needs_attach));
        }
    }
}
