//! The change log on PostgreSQL: triggers give each committed change a version, no matter which client makes it. A
//! fingerprint of the triggers and their functions shows when they were altered.
//!
//! Inside a writer's transaction these functions only insert. A read would take the predicate locks by which PostgreSQL
//! detects conflicts between SERIALIZABLE transactions, and an update could itself conflict, so the triggers would make
//! writers fail. The functions do not rely on session settings to be correct, because any client can change those.

use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::{
    record::{Fingerprint, hex},
    store::{
        names::{SchemaName, bytes_literal},
        postgres::in_schema,
        reads::postgres,
    },
};

/// Version 2 of the tables: adds the change log.
///
/// A transaction is identified by its number and its start time, because a dump that is restored elsewhere can bring
/// back old numbers. Each transaction has one row with an empty `tx.whole`; a trigger on that row assigns the version
/// at commit. In every other row, `whole` is the kind of objects that changed as a whole, or `*` for everything.
pub(crate) const TABLES: &str = "
ALTER TABLE {s}.meta ADD COLUMN fingerprint bytea;
ALTER TABLE {s}.replica ADD COLUMN name text NOT NULL DEFAULT '', ADD COLUMN until timestamptz NOT NULL DEFAULT '-infinity';
CREATE TABLE {s}.tx (
    id xid8 NOT NULL, at timestamptz NOT NULL, whole text NOT NULL, PRIMARY KEY (id, at, whole)
);
CREATE TABLE {s}.change (
    tx xid8 NOT NULL,
    tx_at timestamptz NOT NULL,
    ord bigint GENERATED ALWAYS AS IDENTITY,
    kind text NOT NULL,
    object text,
    PRIMARY KEY (tx, tx_at, ord)
);
CREATE TABLE {s}.writer_lock ();
ALTER TABLE {s}.version ADD COLUMN tx xid8, ADD COLUMN tx_at timestamptz;
CREATE SEQUENCE {s}.version_number;
SELECT setval('{s}.version_number', max(version)) FROM {s}.version;
";

/// Blocks writers and waits for running ones. Use it before any other lock: a migration that waits for writers while it
/// already holds a stronger lock would block readers during that time.
pub(crate) const HOLD_WRITERS: &str = "LOCK TABLE {s}.trust, {s}.api_key IN SHARE ROW EXCLUSIVE MODE";

/// Repairs the change log: creates or replaces functions that are missing or differ from this release, and triggers
/// that are missing, disabled or different. Then records the fingerprint. Changes nothing if everything is intact.
pub(crate) async fn mend(connection: &mut PgConnection, name: &SchemaName) -> Result<(), sqlx::Error> {
    for function in FUNCTIONS {
        if !function.is_current(connection, name).await? {
            let grants = function.inherited_rights(connection, name).await?;
            let sql = function.definition(name) + &grants;
            sqlx::raw_sql(in_schema(&sql, name)).execute(&mut *connection).await?;
        }
    }
    sqlx::raw_sql(in_schema(MEND_TRIGGERS, name)).execute(&mut *connection).await?;
    sqlx::raw_sql(in_schema(FORGET_UNSTAMPED, name)).execute(&mut *connection).await?;
    let left: Vec<String> =
        sqlx::query_scalar(in_schema("SELECT problem FROM {s}.gaps()", name)).fetch_all(&mut *connection).await?;
    if !left.is_empty() && left.iter().all(|problem| problem.ends_with(ATTACH)) {
        // Only the owner of the attached table can repair its triggers. That must not block the repair of our own
        // tables.
        tracing::warn!(
            problems = left.join("; "),
            "attached table is not tracked: replicas cannot renew their leases until its owner repairs the problems"
        );
        return Ok(());
    }
    sqlx::raw_sql(in_schema("SELECT {s}.restore_watch()", name)).execute(connection).await?;
    Ok(())
}

const MEND_TRIGGERS: &str = "
DO $mend$
DECLARE
    gap record;
BEGIN
    FOR attempt IN 1 .. 10000 LOOP
        SELECT * INTO gap FROM {s}.gaps() WITH ORDINALITY ORDER BY creation IS NULL, ordinality LIMIT 1;
        EXIT WHEN NOT FOUND OR gap.creation IS NULL; -- the rest is for others
        IF attempt = 1 THEN
            LOCK TABLE {s}.trust, {s}.api_key IN SHARE ROW EXCLUSIVE MODE;
        END IF;
        IF gap.disabled IS NULL THEN
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', gap.trigger, gap.relation);
            EXECUTE gap.creation;
        END IF;
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', gap.relation, coalesce(gap.disabled, gap.trigger));
    END LOOP;
END
$mend$";

/// Deletes rows that were written while the trigger `trustgate_stamp` was missing. They have no version, and pruning
/// goes by version, so it would not delete them.
const FORGET_UNSTAMPED: &str = "
DELETE FROM {s}.change c WHERE NOT EXISTS (SELECT FROM {s}.version v WHERE v.tx = c.tx AND v.tx_at = c.tx_at);
DELETE FROM {s}.tx t WHERE NOT EXISTS (SELECT FROM {s}.version v WHERE v.tx = t.id AND v.tx_at = t.at)";

/// A function in our schema.
struct Function {
    name: &'static str,
    arguments: &'static str,
    returns: &'static str,
    attributes: &'static str,
    body: &'static str,
    /// The signature of an older function whose callers also need this one. When a migration adds this function, each
    /// role that may call the older one gets the right to call this one, so an upgrade needs no new grants.
    rights_of: Option<&'static str>,
}

impl Function {
    /// True if the database has this function as this release defines it.
    async fn is_current(&self, connection: &mut PgConnection, name: &SchemaName) -> Result<bool, sqlx::Error> {
        // The catalog keeps the text of the body, but only a parsed form of the attributes: compare the body as text,
        // and of the attributes the two that matter for security.
        let sql = "SELECT FROM pg_proc
             WHERE oid = to_regprocedure($1) AND prosrc = $2 AND proconfig @> ARRAY['search_path=pg_catalog, pg_temp']
                AND prosecdef = ($3 LIKE '%SECURITY DEFINER%')";
        let found = sqlx::query(sql)
            .bind(self.signature(name))
            .bind(self.body(name))
            .bind(self.attributes)
            .fetch_optional(connection)
            .await?;
        Ok(found.is_some())
    }

    /// The name, qualified with the schema, and the types of the arguments.
    fn signature(&self, schema: &SchemaName) -> String {
        let types = self.arguments.split(", ").filter_map(|argument| argument.split_once(' ')).map(|(_, of)| of);
        format!("{}.{}({})", schema.as_str(), self.name, types.collect::<Vec<_>>().join(", "))
    }

    /// GRANT statements that give a new function the rights of [`Self::rights_of`]; empty if the function already
    /// exists.
    async fn inherited_rights(
        &self,
        connection: &mut PgConnection,
        schema: &SchemaName,
    ) -> Result<String, sqlx::Error> {
        let Some(model) = self.rights_of else { return Ok(String::new()) };
        let sql = "SELECT format('; GRANT EXECUTE ON FUNCTION %s TO %s', $1, acl.grantee::regrole)
             FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) acl
             WHERE p.oid = to_regprocedure($2) AND to_regprocedure($1) IS NULL
                AND acl.privilege_type = 'EXECUTE' AND acl.grantee NOT IN (0, p.proowner)";
        let grants: Vec<String> = sqlx::query_scalar(sql)
            .bind(self.signature(schema))
            .bind(format!("{}.{model}", schema.as_str()))
            .fetch_all(connection)
            .await?;
        Ok(grants.concat())
    }

    fn definition(&self, schema: &SchemaName) -> String {
        let (Self { name, arguments, returns, attributes, .. }, body) = (self, self.body(schema));
        format!(
            "CREATE OR REPLACE FUNCTION {{s}}.{name}({arguments}) RETURNS {returns}
             LANGUAGE plpgsql {attributes} SET search_path = pg_catalog, pg_temp AS $body${body}$body$;
             REVOKE ALL ON FUNCTION {{s}}.{name}({arguments}) FROM PUBLIC"
        )
    }

    fn body(&self, schema: &SchemaName) -> String {
        let time = |column| postgres::micros(&format!("k.{column}"));
        let body = self.body.replace("{gaps}", GAPS).replace("{not_before}", &time("not_before"));
        filled(&body.replace("{expires_at}", &time("expires_at")).replace("{revoked_at}", &time("revoked_at")), schema)
    }
}

/// Fills the placeholders in `text`: the schema, some constants, and the digests of the functions that record changes.
fn filled(text: &str, schema: &SchemaName) -> String {
    let no_pepper = format!("{}::bytea", bytes_literal(&Fingerprint::NO_PEPPER.to_string()));
    let text = text.replace("{s}", schema.as_str()).replace("{attach}", ATTACH).replace("{no_pepper}", &no_pepper);
    if !text.contains("{functions}") {
        return text;
    }
    let recording = FUNCTIONS.iter().filter(|function| RECORDING.contains(&function.name));
    let digests =
        recording.map(|function| format!("('{}', '{}')", function.name, hex(&Sha256::digest(function.body(schema)))));
    text.replace("{functions}", &digests.collect::<Vec<_>>().join(", "))
}

/// A query for the problems that keep changes from being recorded, as messages. It is the query inside the function
/// `gaps`, for a role that may not call that function. It reads only the catalog and `meta`.
pub(crate) fn problems(schema: &SchemaName) -> String {
    let gaps = filled(GAPS, schema);
    format!("SELECT g.problem FROM ({gaps}) AS g (relation, name, disabled, creation, problem)")
}

/// The functions that record changes. The function `fingerprint` repeats this list.
const RECORDING: &[&str] = &["note", "api_key_changed", "trust_changed", "truncated", "stamp"];

/// The end of the messages about problems that only `trustgate attach` can repair.
pub(crate) const ATTACH: &str = ": run `trustgate attach`";

/// A query for the triggers and functions that are missing, disabled or different, in the columns of the function
/// `gaps`. The bits of `pg_trigger.tgtype`: 1 FOR EACH ROW, 4 INSERT, 8 DELETE, 16 UPDATE, 32 TRUNCATE.
const GAPS: &str = "WITH RECURSIVE wanted (home, root, name, function, type, deferred, creation) AS (
        SELECT '{s}', own.* FROM (VALUES
            ('api_key', 'trustgate_changed', 'api_key_changed', 29, false,
                'TRIGGER %I AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW'),
            ('api_key', 'trustgate_truncated', 'truncated', 32, false, 'TRIGGER %I AFTER TRUNCATE ON %s'),
            ('trust', 'trustgate_changed', 'trust_changed', 29, false,
                'TRIGGER %I AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW'),
            ('trust', 'trustgate_truncated', 'truncated', 32, false, 'TRIGGER %I AFTER TRUNCATE ON %s'),
            ('tx', 'trustgate_stamp', 'stamp', 5, true,
                'CONSTRAINT TRIGGER %I AFTER INSERT ON %s DEFERRABLE INITIALLY DEFERRED FOR EACH ROW')
        ) AS own (root, name, function, type, deferred, creation)
        UNION ALL
        -- Only who owns that table can make them.
        SELECT m.attached_schema, m.attached_table, theirs.name, 'attached_changed', theirs.type, false, NULL
        FROM {s}.meta m CROSS JOIN (VALUES ('trustgate_changed', 29), ('trustgate_truncated', 32)) AS theirs (name, type)
        WHERE m.attached_table IS NOT NULL
    ), tree (home, root, oid, depth) AS (
        SELECT n.nspname::text, c.relname::text, c.oid, 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE (n.nspname::text, c.relname::text) IN (SELECT home, root FROM wanted)
        UNION ALL
        SELECT tree.home, tree.root, i.inhrelid, depth + 1 FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
    ), gap AS (
        SELECT wanted.*, tree.oid, tree.depth, c.relkind, c.relrowsecurity, (
            SELECT g.tgname FROM pg_trigger g
                WHERE g.tgrelid = tree.oid AND g.tgfoid = to_regprocedure(format('{s}.%s()', wanted.function))
                    AND g.tgtype = wanted.type AND g.tgqual IS NULL AND g.tgattr::text = ''
                    AND g.tgdeferrable = wanted.deferred AND g.tginitdeferred = wanted.deferred
                ORDER BY g.tgenabled = 'A' DESC LIMIT 1
        ) AS found
        FROM wanted LEFT JOIN tree USING (home, root) LEFT JOIN pg_class c ON c.oid = tree.oid
        -- A new part of their table gets the trigger for its rows by itself, and this one never: that it was emptied
        -- shows in the fingerprint.
        WHERE (wanted.function = 'attached_changed' AND wanted.type = 32 AND c.relispartition) IS NOT TRUE
    )
    SELECT gap.oid::regclass, gap.name::name, gap.found,
        CASE WHEN gap.relkind IN ('r', 'p') AND NOT gap.relrowsecurity
            THEN format('CREATE ' || gap.creation || ' EXECUTE FUNCTION {s}.%s()', gap.name, gap.oid::regclass, function) END,
        CASE
            WHEN gap.oid IS NULL THEN format('there is no table %I.%I', gap.home, gap.root)
            WHEN gap.relkind NOT IN ('r', 'p') THEN format('%s is no table of which every change is seen', gap.oid::regclass)
            WHEN gap.relrowsecurity THEN format('%s has row level security: ALTER TABLE %1$s DISABLE ROW LEVEL SECURITY;'
                || ' what a policy shows may change without any change of a row', gap.oid::regclass)
            WHEN gap.found IS NULL THEN format('the trigger %s on table %s is missing', gap.name, gap.oid::regclass)
            ELSE format('the trigger %s on table %s is not enabled for every session (ENABLE ALWAYS)',
                gap.found, gap.oid::regclass)
        END || CASE WHEN gap.function = 'attached_changed' AND gap.relrowsecurity IS NOT TRUE THEN '{attach}' ELSE '' END
    FROM (SELECT * FROM gap ORDER BY depth NULLS FIRST, oid, name) AS gap
    WHERE gap.oid IS NULL OR gap.relkind NOT IN ('r', 'p') OR gap.relrowsecurity OR gap.found IS NULL
        OR NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = gap.oid AND g.tgname = gap.found AND g.tgenabled = 'A')
    UNION ALL
    SELECT NULL, NULL, NULL, NULL, format('the function {s}.%s is not the one that was made with the tables', made.name)
        || CASE WHEN made.name = 'attached_changed' THEN '{attach}' ELSE '' END
    FROM (
        VALUES {functions}
        UNION ALL
        SELECT 'attached_changed', m.attached_digest FROM {s}.meta m WHERE m.attached_digest IS NOT NULL
    ) AS made (name, digest) WHERE NOT EXISTS (
        SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname = '{s}' AND p.proname = made.name
                AND encode(sha256(convert_to(p.prosrc, 'UTF8')), 'hex') = made.digest
    )";

const DEFINER: &str = "SECURITY DEFINER";
/// STABLE: all statements in the function see the snapshot of the calling statement. A connection plans each statement
/// once, so the plan must stay good while the tables grow: use indexes, and no JIT compilation, which takes longer than
/// the statements themselves.
const ONE_SNAPSHOT: &str = "STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off";

/// The return type of `find` and `find_key`: the columns of a read, followed by those in `$more`.
macro_rules! found {
    ($more:literal) => {
        concat!(
            "TABLE (
            version bigint, nonce text, incarnation text, system bigint, timeline bigint, clock bigint,
            key_id text, trust_id text, trust_enabled bigint, digest text, scheme bigint, scopes text, allowed_cidrs text,
            not_before bigint, expires_at bigint, revoked_at bigint",
            $more,
            "
        )"
        )
    };
}

/// The body of `find` and `find_key`. `$more`: the expressions for the columns that [`found`] gets in its `$more`.
///
/// One statement reads everything, so all values are from one snapshot. `statement_timestamp()` is the time when the
/// server received the statement. That is before it takes the snapshot, so an age is not underestimated.
/// `pg_current_wal_lsn()` fails on a standby, as intended: a standby may not have received a revocation yet.
macro_rules! find_body {
    ($more:literal) => {
        concat!(
            "
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT v.version, encode(v.nonce, 'hex'), m.incarnation::text, c.system_identifier,
        ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint,
        (extract(epoch FROM statement_timestamp()) * 1000000)::bigint,
        k.id::text, t.id::text, t.enabled::int::bigint, encode(k.digest, 'hex'), k.scheme::bigint,
        array_to_json(k.scopes)::text, array_to_json(k.allowed_cidrs)::text,
        {not_before}, {expires_at}, {revoked_at}",
            $more,
            "
    FROM (SELECT version, nonce FROM {s}.version ORDER BY version DESC LIMIT 1) v
    CROSS JOIN {s}.meta m
    CROSS JOIN pg_control_system() c
    LEFT JOIN (
        SELECT * FROM {s}.api_key WHERE digest = ANY (digests)
        UNION ALL
        SELECT * FROM {s}.api_key WHERE id = key
    ) k JOIN {s}.trust t ON t.id = k.trust_id ON true;
END
"
        )
    };
}

const FIND_ATTRIBUTES: &str = "STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
             SET plan_cache_mode = force_generic_plan";

const FUNCTIONS: &[Function] = &[
    Function {
        name: "note",
        arguments: "kind text, object text",
        returns: "void",
        attributes: DEFINER,
        rights_of: None,
        // If a transaction changes more than 10 000 objects of one kind, the function records that the whole kind
        // changed, because no poll reads that many rows. The count is in a session setting, which any client can
        // change. A wrong count makes the record coarser or finer, but not wrong.
        body: "
DECLARE
    counter CONSTANT text := 'trustgate.{s}_' || kind;
    counted CONSTANT text := current_setting(counter, true);
    listed CONSTANT bigint := CASE WHEN counted ~ '^[0-9]{1,9}$' THEN counted::bigint ELSE 0 END;
BEGIN
    IF listed >= 10000 THEN
        INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), kind)
            ON CONFLICT DO NOTHING;
    ELSE
        PERFORM set_config(counter, (listed + 1)::text, true);
        INSERT INTO {s}.change (tx, tx_at, kind, object)
            VALUES (pg_current_xact_id(), transaction_timestamp(), kind, object);
    END IF;
END
",
    },
    Function {
        name: "api_key_changed",
        arguments: "",
        returns: "trigger",
        attributes: DEFINER,
        rights_of: None,
        body: "
BEGIN
    IF TG_OP = 'UPDATE' AND (
        OLD.id, OLD.trust_id, OLD.digest, OLD.scheme, OLD.scopes, OLD.allowed_cidrs,
        OLD.not_before, OLD.expires_at, OLD.revoked_at
    ) IS NOT DISTINCT FROM (
        NEW.id, NEW.trust_id, NEW.digest, NEW.scheme, NEW.scopes, NEW.allowed_cidrs,
        NEW.not_before, NEW.expires_at, NEW.revoked_at
    ) THEN
        RETURN NULL;
    END IF;
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '')
        ON CONFLICT DO NOTHING;
    IF TG_OP <> 'INSERT' THEN
        PERFORM {s}.note('key', OLD.id::text);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.id IS DISTINCT FROM OLD.id THEN
        PERFORM {s}.note('key', NEW.id::text);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM {s}.note('absent', encode(NEW.digest, 'hex'));
    END IF;
    IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE' AND (NEW.digest IS DISTINCT FROM OLD.digest OR NEW.revoked_at IS NOT NULL)
    THEN
        PERFORM {s}.note('gone', encode(OLD.digest, 'hex'));
    END IF;
    RETURN NULL;
END
",
    },
    Function {
        name: "trust_changed",
        arguments: "",
        returns: "trigger",
        attributes: DEFINER,
        rights_of: None,
        body: "
BEGIN
    IF TG_OP = 'UPDATE' AND (OLD.id, OLD.enabled) IS NOT DISTINCT FROM (NEW.id, NEW.enabled) THEN
        RETURN NULL;
    END IF;
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '')
        ON CONFLICT DO NOTHING;
    IF TG_OP <> 'INSERT' THEN
        PERFORM {s}.note('trust', OLD.id::text);
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.id IS DISTINCT FROM OLD.id THEN
        PERFORM {s}.note('trust', NEW.id::text);
    END IF;
    RETURN NULL;
END
",
    },
    Function {
        name: "truncated",
        arguments: "",
        returns: "trigger",
        attributes: DEFINER,
        rights_of: None,
        // A record combines a key with its trust, so truncating either table makes all records out of date.
        body: "
BEGIN
    INSERT INTO {s}.tx (id, at, whole)
        SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', 'key', 'trust']) AS kind
        ON CONFLICT DO NOTHING;
    RETURN NULL;
END
",
    },
    Function {
        name: "everything",
        arguments: "",
        returns: "void",
        attributes: DEFINER,
        rights_of: None,
        body: "
BEGIN
    INSERT INTO {s}.tx (id, at, whole)
        SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', '*']) AS kind
        ON CONFLICT DO NOTHING;
END
",
    },
    Function {
        name: "stamp",
        arguments: "",
        returns: "trigger",
        attributes: DEFINER,
        rights_of: None,
        // Runs once per transaction, at the commit. The lock is released when the commit becomes visible, so versions
        // are in commit order. A visible commit must be on disk, so asynchronous commits are turned off. A client can
        // run this trigger before the commit (SET CONSTRAINTS), so an idle timeout keeps it from holding the lock
        // without end. PREPARE TRANSACTION would also keep the lock, but PostgreSQL rejects it after a NOTIFY.
        body: "
BEGIN
    IF NEW.whole <> '' THEN
        RETURN NULL;
    END IF;
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
    IF current_setting('idle_in_transaction_session_timeout') = '0' THEN
        PERFORM set_config('idle_in_transaction_session_timeout', '3s', true);
    END IF;
    PERFORM pg_notify('{s}', '');
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO {s}.version (version, nonce, at, tx, tx_at) VALUES (
        nextval('{s}.version_number'), uuid_send(gen_random_uuid()), clock_timestamp(), NEW.id, NEW.at
    );
    RETURN NULL;
END
",
    },
    Function {
        name: "fingerprint",
        arguments: "",
        returns: "bytea",
        attributes: ONE_SNAPSHOT,
        rights_of: None,
        // An object that is altered and restored within one transaction also changes the fingerprint: xmin is the
        // transaction that wrote the catalog row. Renaming or dropping a column changes only the row of that column, so
        // columns are listed, but only those of the root tables: partitions and child tables follow their parents.
        body: "
BEGIN
    RETURN sha256(convert_to((
        WITH RECURSIVE home AS (
            SELECT oid FROM pg_namespace WHERE nspname = '{s}'
        ), root (oid) AS (
            SELECT c.oid FROM home JOIN pg_class c ON c.relnamespace = home.oid
                WHERE c.relname IN ('api_key', 'trust', 'tx')
            UNION ALL
            SELECT c.oid FROM {s}.meta m JOIN pg_namespace n ON n.nspname = m.attached_schema
                JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = m.attached_table
        ), tree (oid) AS (
            SELECT oid FROM root
            UNION
            SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
        ), fact (line) AS (
            SELECT concat_ws(' ', 'table', c.oid, c.relfilenode, c.relkind, c.xmin) FROM tree JOIN pg_class c USING (oid)
            UNION ALL
            SELECT concat_ws(' ', 'column', a.attrelid, a.attnum, a.atttypid, a.attgenerated, a.attname)
                FROM root JOIN pg_attribute a ON a.attrelid = root.oid WHERE a.attnum > 0
            UNION ALL
            SELECT concat_ws(' ', 'child', i.inhparent, i.inhrelid, i.xmin)
                FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
            UNION ALL
            SELECT concat_ws(' ', 'trigger', g.tgrelid, g.oid, g.tgfoid, g.tgtype, g.tgenabled, g.xmin)
                FROM tree JOIN pg_trigger g ON g.tgrelid = tree.oid
            UNION ALL
            SELECT concat_ws(' ', 'function', p.oid, p.xmin) FROM home JOIN pg_proc p ON p.pronamespace = home.oid
                WHERE p.proname IN ('note', 'api_key_changed', 'trust_changed', 'truncated', 'stamp', 'attached_changed')
        )
        SELECT string_agg(line, ';' ORDER BY line) FROM fact
    ), 'UTF8'));
END
",
    },
    Function {
        name: "gaps",
        arguments: "",
        returns: "TABLE (relation regclass, trigger name, disabled name, creation text, problem text)",
        attributes: "STABLE",
        rights_of: None,
        body: "
#variable_conflict use_column
BEGIN
    RETURN QUERY {gaps};
END
",
    },
    Function {
        name: "restore_watch",
        arguments: "",
        returns: "void",
        attributes: DEFINER,
        rights_of: None,
        // The function computes the fingerprint before it checks the triggers. A change in between makes the
        // fingerprint differ again, so the next poll notices it.
        body: "
DECLARE
    present bytea;
    gap record;
BEGIN
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    present := {s}.fingerprint();
    SELECT problem INTO gap FROM {s}.gaps() LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = gap.problem;
    END IF;
    UPDATE {s}.meta SET fingerprint = present WHERE fingerprint IS DISTINCT FROM present;
    IF FOUND THEN
        PERFORM {s}.everything();
    END IF;
END
",
    },
    Function {
        name: "renew_incarnation",
        arguments: "lost uuid",
        returns: "void",
        attributes: DEFINER,
        rights_of: None,
        body: "
BEGIN
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    UPDATE {s}.meta SET incarnation = gen_random_uuid() WHERE incarnation = lost;
    IF FOUND THEN
        PERFORM {s}.everything();
    END IF;
END
",
    },
    Function {
        name: "prune",
        arguments: "",
        returns: "void",
        attributes: "SECURITY DEFINER SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off",
        rights_of: None,
        // Keeps all versions of the last 20 minutes and the one before them, which was the newest until then: a
        // starting replica reads the last 15 minutes, and a running replica polls from the version that it applied
        // last. The number of the lock is the first 8 bytes of SHA-256('trustgate prune').
        body: "
DECLARE
    kept bigint;
    pruned record;
    rows_deleted bigint := 0;
    rows_more bigint;
BEGIN
    IF NOT pg_try_advisory_xact_lock(4605386746314727875) THEN
        RETURN;
    END IF;
    SELECT version INTO kept FROM {s}.version
        WHERE at >= clock_timestamp() - interval '20 minutes' ORDER BY version LIMIT 1;
    SELECT version INTO kept FROM {s}.version WHERE kept IS NULL OR version < kept ORDER BY version DESC LIMIT 1;
    FOR pruned IN SELECT version, tx, tx_at FROM {s}.version WHERE version < kept ORDER BY version LIMIT 1000 LOOP
        DELETE FROM {s}.version WHERE version = pruned.version;
        DELETE FROM {s}.tx WHERE id = pruned.tx AND at = pruned.tx_at;
        DELETE FROM {s}.change WHERE tx = pruned.tx AND tx_at = pruned.tx_at;
        GET DIAGNOSTICS rows_more = ROW_COUNT;
        rows_deleted := rows_deleted + rows_more;
        EXIT WHEN rows_deleted >= 5000;
    END LOOP;
END
",
    },
    Function {
        // For releases with version 3 of the tables, which may still be running, or to which an operator may roll back.
        name: "find",
        arguments: "digests bytea[], key uuid",
        returns: found!(""),
        attributes: FIND_ATTRIBUTES,
        rights_of: None,
        body: find_body!(""),
    },
    Function {
        name: "find_key",
        arguments: "digests bytea[], key uuid",
        returns: found!(", pepper_unrecorded bigint"),
        attributes: FIND_ATTRIBUTES,
        rights_of: Some("find(bytea[], uuid)"),
        body: find_body!(", (k.scheme = 1 AND k.pepper_fingerprint IS NULL)::int::bigint"),
    },
    Function {
        name: "hold_pepper",
        arguments: "made_under bytea",
        returns: "text",
        attributes: DEFINER,
        rights_of: Some("everything()"),
        // Records the pepper of the first key if none is recorded, and returns the recorded one. Concurrent calls wait
        // for each other. If keys were issued without a pepper, records "no pepper" as the previous one. Imported
        // digests have an empty hint and do not count as issued.
        body: "
BEGIN
    IF made_under IS NOT NULL THEN
        UPDATE {s}.meta SET pepper_fingerprint = made_under, previous_pepper_fingerprint = CASE
                WHEN EXISTS (SELECT FROM {s}.api_key WHERE scheme = 0 AND hint <> '') THEN {no_pepper} END
            WHERE pepper_fingerprint IS NULL;
    END IF;
    RETURN (SELECT encode(pepper_fingerprint, 'hex') FROM {s}.meta);
END
",
    },
    Function {
        name: "use_pepper",
        arguments: "made_under bytea",
        returns: "text",
        attributes: DEFINER,
        rights_of: Some("everything()"),
        // Returns the pepper that was recorded before.
        body: "
DECLARE
    before bytea;
BEGIN
    SELECT pepper_fingerprint INTO before FROM {s}.meta FOR UPDATE;
    IF before IS NULL THEN
        PERFORM {s}.hold_pepper(made_under);
    ELSE
        UPDATE {s}.meta SET pepper_fingerprint = made_under, previous_pepper_fingerprint = before
            WHERE pepper_fingerprint <> made_under;
    END IF;
    RETURN encode(before, 'hex');
END
",
    },
    Function {
        name: "record_peppers",
        arguments: "keys uuid[], made_under bytea[], current bytea",
        returns: "void",
        attributes: DEFINER,
        rights_of: Some("prune()"),
        // Called by the role of `serve`, which can change nothing else in a key. The change gets no version, because no
        // decision reads this column. Skips keys that another replica has locked.
        body: "
BEGIN
    UPDATE {s}.api_key k SET pepper_fingerprint = proven.fingerprint
        FROM unnest(keys, made_under) AS proven (id, fingerprint)
        WHERE k.id = proven.id AND k.id IN (
            SELECT id FROM {s}.api_key WHERE id = ANY (keys) AND scheme = 1 AND pepper_fingerprint IS NULL
                ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
        );
    IF current = ANY (made_under) THEN
        PERFORM {s}.hold_pepper(current);
    END IF;
END
",
    },
    Function {
        name: "poll",
        arguments: "since bigint, rows_max bigint",
        returns: "TABLE (
            state text, oldest bigint, newest bigint, newest_nonce text, incarnation text, system bigint, timeline bigint,
            clock bigint, watched bigint, stamped_at bigint, version bigint, nonce text, kind text, object text
        )",
        attributes: ONE_SNAPSHOT,
        rights_of: None,
        body: "
#variable_conflict use_column
DECLARE
    first bigint := since;
    after bigint := since;
    listed text[];
    wholes text[];
BEGIN
    state := CASE
        WHEN pg_is_in_recovery() THEN 'standby'
        WHEN current_setting('transaction_read_only')::boolean THEN 'read-only'
        ELSE 'primary'
    END;
    IF state <> 'primary' THEN
        RETURN NEXT;
        RETURN;
    END IF;
    SELECT v.version, encode(v.nonce, 'hex'), (extract(epoch FROM v.at) * 1000000)::bigint
        INTO newest, newest_nonce, stamped_at FROM {s}.version v ORDER BY v.version DESC LIMIT 1;
    IF newest IS NULL THEN
        RETURN;
    END IF;
    IF since IS NULL THEN
        SELECT v.version INTO first FROM {s}.version v
            WHERE v.at >= clock_timestamp() - interval '15 minutes' ORDER BY v.version LIMIT 1;
        first := coalesce(first, newest);
        after := first - 1;
    END IF;
    -- Beyond versions that were deleted a moment ago the oldest is not found at once, so it is looked for only where
    -- it matters.
    SELECT v.version INTO oldest FROM {s}.version v WHERE v.version = since;
    IF oldest IS NULL THEN
        SELECT v.version INTO oldest FROM {s}.version v ORDER BY v.version LIMIT 1;
    END IF;
    SELECT m.incarnation::text, coalesce((m.fingerprint = {s}.fingerprint())::int, 0)
        INTO incarnation, watched FROM {s}.meta m;
    SELECT c.system_identifier INTO system FROM pg_control_system() c;
    -- Of the log being written: the timeline in the control file changes only with the first checkpoint after a
    -- promotion.
    timeline := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint;
    clock := (extract(epoch FROM statement_timestamp()) * 1000000)::bigint;
    -- Kinds are listed, the smallest first, while there is room in the answer; the others are named as a whole. Where
    -- even counting would take long, everything is.
    IF newest > after THEN
        WITH noted (kind) AS (
            SELECT c.kind FROM {s}.version v CROSS JOIN LATERAL (
                SELECT c.kind FROM {s}.change c WHERE c.tx = v.tx AND c.tx_at = v.tx_at OFFSET 0
            ) c WHERE v.version > after LIMIT 40000
        ), counted (kind, number) AS (
            SELECT kind, count(*) FROM noted GROUP BY kind
        ), room (number) AS (
            SELECT CASE WHEN (SELECT sum(number) FROM counted) < 40000 THEN rows_max - 10 - count(*) ELSE 0 END
                FROM (SELECT FROM {s}.version v WHERE v.version >= first LIMIT rows_max) v
        ), whole (kind) AS (
            SELECT t.whole FROM {s}.version v CROSS JOIN LATERAL (
                SELECT t.whole FROM {s}.tx t
                    WHERE t.id = v.tx AND t.at = v.tx_at AND t.whole <> ALL (ARRAY['', '*']) OFFSET 0
            ) t WHERE v.version > after
            UNION
            SELECT '*' WHERE (SELECT sum(number) FROM counted) >= 40000
        ), sorted (kind, fits) AS (
            SELECT kind, sum(number) OVER (ORDER BY number, kind DESC) <= (SELECT number FROM room)
                FROM counted WHERE kind NOT IN (SELECT kind FROM whole)
            UNION ALL
            SELECT kind, false FROM whole
        )
        SELECT array_agg(kind) FILTER (WHERE fits), array_agg(kind) FILTER (WHERE NOT fits) INTO listed, wholes FROM sorted;
    END IF;
    FOR version, nonce, kind, object IN
        SELECT v.version, encode(v.nonce, 'hex'), NULL::text, NULL::text FROM {s}.version v WHERE v.version >= first
        UNION ALL
        SELECT newest, NULL, whole, NULL FROM unnest(wholes) AS whole
        UNION ALL
        SELECT v.version, NULL, t.whole, NULL FROM {s}.version v CROSS JOIN LATERAL (
            SELECT t.whole FROM {s}.tx t WHERE t.id = v.tx AND t.at = v.tx_at AND t.whole = '*' OFFSET 0
        ) t WHERE v.version > after
        UNION ALL
        SELECT v.version, NULL, c.kind, c.object FROM {s}.version v CROSS JOIN LATERAL (
            SELECT c.kind, c.object FROM {s}.change c
                WHERE c.tx = v.tx AND c.tx_at = v.tx_at AND c.kind = ANY (listed) ORDER BY c.ord OFFSET 0
        ) c WHERE v.version > after AND listed IS NOT NULL
        LIMIT rows_max
    LOOP
        RETURN NEXT;
    END LOOP;
    IF NOT FOUND THEN
        RETURN NEXT;
    END IF;
END
",
    },
];
