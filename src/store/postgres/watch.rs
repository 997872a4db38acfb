//! How every committed change of trusts and keys gets a version, whoever makes it: triggers, functions, and the
//! fingerprint by which a poll notices that one of them is gone.
//!
//! Nothing here reads our own tables inside somebody's transaction: under SERIALIZABLE such reads would make writers fail
//! that have nothing to do with each other. It inserts, and the poll reads.

/// Adds what versions need to tables of version 1. Safe to run again: it makes what is missing.
pub(super) const TABLES: &str = "
ALTER TABLE {s}.meta ADD COLUMN IF NOT EXISTS fingerprint text NOT NULL DEFAULT '';
ALTER TABLE {s}.replica ADD COLUMN IF NOT EXISTS name text NOT NULL DEFAULT '';
ALTER TABLE {s}.replica ADD COLUMN IF NOT EXISTS until timestamptz NOT NULL DEFAULT '-infinity';
-- A transaction that changed something. Its id alone would not do: a dump that is restored into another cluster brings
-- ids along that are yet to come there. `whole`: '' for the one row that draws the version, else a kind that changed as a
-- whole, or '*' for everything.
CREATE TABLE IF NOT EXISTS {s}.tx (id xid8, at timestamptz, whole text, PRIMARY KEY (id, at, whole));
CREATE SEQUENCE IF NOT EXISTS {s}.change_ord;
CREATE TABLE IF NOT EXISTS {s}.change (
    tx xid8, tx_at timestamptz, ord bigint, kind text NOT NULL, object text NOT NULL, PRIMARY KEY (tx, tx_at, ord)
);
CREATE TABLE IF NOT EXISTS {s}.writer_lock ();
ALTER TABLE {s}.version ADD COLUMN IF NOT EXISTS tx xid8;
ALTER TABLE {s}.version ADD COLUMN IF NOT EXISTS tx_at timestamptz;
CREATE SEQUENCE IF NOT EXISTS {s}.version_number;
-- Above every version there is.
SELECT setval('{s}.version_number', greatest(
    (SELECT max(version) FROM {s}.version), (SELECT last_value FROM {s}.version_number)
));
";

/// The functions and triggers. Safe to run again: it puts right what was altered.
pub(super) const TRIGGERS: &str = r"
-- Names an object that changed in this transaction; above 10 000 of a kind, the kind. How many there were is counted in a
-- setting of the transaction: whoever forges it makes the naming coarser or finer, never wrong.
CREATE OR REPLACE FUNCTION {s}.name(kind text, object text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    counter constant text := 'trustgate.named_' || kind;
    text_of_count constant text := current_setting(counter, true);
    count integer := CASE WHEN text_of_count ~ '^[0-9]{1,6}$' THEN text_of_count::integer ELSE 0 END;
BEGIN
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '') ON CONFLICT DO NOTHING;
    IF count < 10000 THEN
        INSERT INTO {s}.change (tx, tx_at, ord, kind, object)
        VALUES (pg_current_xact_id(), transaction_timestamp(), nextval('{s}.change_ord'), kind, object);
        PERFORM set_config(counter, (count + 1)::text, true);
    ELSE
        INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), kind)
        ON CONFLICT DO NOTHING;
    END IF;
END $$;

-- Names a kind as a whole, or everything.
CREATE OR REPLACE FUNCTION {s}.name_whole(kind text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO {s}.tx (id, at, whole)
    VALUES (pg_current_xact_id(), transaction_timestamp(), ''), (pg_current_xact_id(), transaction_timestamp(), kind)
    ON CONFLICT DO NOTHING
$$;

CREATE OR REPLACE FUNCTION {s}.api_key_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM {s}.name_whole('key');
    ELSIF TG_OP = 'INSERT' THEN
        PERFORM {s}.name('absent', encode(NEW.digest, 'hex'));
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM {s}.name('key', OLD.id::text), {s}.name('gone', encode(OLD.digest, 'hex'));
    ELSIF (OLD.id, OLD.trust_id, OLD.digest, OLD.scheme, OLD.scopes, OLD.allowed_cidrs, OLD.not_before, OLD.expires_at,
           OLD.revoked_at) IS DISTINCT FROM (NEW.id, NEW.trust_id, NEW.digest, NEW.scheme, NEW.scopes,
           NEW.allowed_cidrs, NEW.not_before, NEW.expires_at, NEW.revoked_at) THEN
        PERFORM {s}.name('key', OLD.id::text), {s}.name('absent', encode(NEW.digest, 'hex'));
        IF OLD.id <> NEW.id THEN
            PERFORM {s}.name('key', NEW.id::text);
        END IF;
        IF OLD.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL THEN
            PERFORM {s}.name('gone', encode(OLD.digest, 'hex'));
        END IF;
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION {s}.trust_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM {s}.name_whole('trust'), {s}.name_whole('key');
    ELSIF TG_OP = 'INSERT' THEN
        PERFORM {s}.name('trust', NEW.id::text);
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM {s}.name('trust', OLD.id::text);
    ELSIF (OLD.id, OLD.enabled) IS DISTINCT FROM (NEW.id, NEW.enabled) THEN
        PERFORM {s}.name('trust', OLD.id::text), {s}.name('trust', NEW.id::text);
    END IF;
    RETURN NULL;
END $$;

-- Runs at the commit of a transaction that changed something. The lock is held until that commit is visible to others, so
-- version order is commit order; it is taken this late that no other writer waits for anything but one insert.
CREATE OR REPLACE FUNCTION {s}.stamp() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- SET CONSTRAINTS ALL IMMEDIATE takes the lock early: then nobody may sit on it.
    IF current_setting('idle_in_transaction_session_timeout') IN ('0', '0ms') THEN
        PERFORM set_config('idle_in_transaction_session_timeout', '3s', true);
    END IF;
    -- A version that was seen must survive a crash.
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO {s}.version (version, nonce, tx, tx_at, at)
    VALUES (nextval('{s}.version_number'), uuid_send(gen_random_uuid()), NEW.id, NEW.at, clock_timestamp());
    -- A hint, without content. It also makes PREPARE TRANSACTION fail, whose lock could be held for ever.
    PERFORM pg_notify('{s}', '');
    RETURN NULL;
END $$;

-- Everything by which changes are named: tables with their children, triggers, functions. Altering any of them gives
-- another fingerprint, also for good by a second alteration: xmin is the transaction that last wrote the catalog's row.
CREATE OR REPLACE FUNCTION {s}.fingerprint() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH watched AS (
        SELECT c.oid, c.relfilenode FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = '{s}' AND c.relname IN ('api_key', 'trust', 'tx')
    ), parts AS (
        SELECT concat_ws(' ', 't', oid, CASE WHEN oid = to_regclass('{s}.tx') THEN 0 ELSE relfilenode END) AS part
        FROM watched
        UNION ALL
        SELECT concat_ws(' ', 'c', i.inhparent, i.inhrelid) FROM pg_inherits i JOIN watched w ON w.oid IN (i.inhparent, i.inhrelid)
        UNION ALL
        SELECT concat_ws(' ', 'g', t.tgrelid, t.oid, t.tgname, t.tgenabled, t.tgfoid, t.xmin) FROM pg_trigger t
        JOIN watched w ON w.oid = t.tgrelid WHERE NOT t.tgisinternal
        UNION ALL
        SELECT concat_ws(' ', 'f', p.oid, p.proname, p.xmin) FROM pg_proc p
        JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = '{s}'
    )
    SELECT encode(sha256(convert_to(coalesce(string_agg(part, ',' ORDER BY part), ''), 'UTF8')), 'hex') FROM parts
$$;

-- Makes sure that changes are named, and draws a version 'everything changed' for what may have passed meanwhile.
CREATE OR REPLACE FUNCTION {s}.restore_watch() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    missing text;
BEGIN
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    SELECT string_agg(format('%s on %s.%s', expected.tgname, '{s}', expected.relname), ', ') INTO missing
    FROM (VALUES
        ('api_key', 'trustgate_row', 'api_key_changed', 29), ('api_key', 'trustgate_truncate', 'api_key_changed', 32),
        ('trust', 'trustgate_row', 'trust_changed', 29), ('trust', 'trustgate_truncate', 'trust_changed', 32),
        ('tx', 'trustgate_stamp', 'stamp', 5)
    ) AS expected (relname, tgname, proname, tgtype)
    WHERE NOT EXISTS (
        SELECT FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_proc p ON p.oid = t.tgfoid
        WHERE n.nspname = '{s}' AND c.relname = expected.relname AND t.tgname = expected.tgname
            AND p.proname = expected.proname AND p.pronamespace = n.oid AND t.tgtype = expected.tgtype
            AND t.tgenabled = 'A' AND t.tgattr::text = '' AND (t.tgqual IS NULL OR expected.relname = 'tx')
    );
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'changes are not named: missing, disabled or altered: %', missing;
    END IF;
    SELECT string_agg(i.inhrelid::regclass::text, ', ') INTO missing FROM pg_inherits i
    WHERE i.inhparent IN (to_regclass('{s}.api_key'), to_regclass('{s}.trust'));
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'changes are not named: tables that inherit from ours are not watched: %', missing;
    END IF;
    IF (SELECT fingerprint FROM {s}.meta) <> {s}.fingerprint() THEN
        UPDATE {s}.meta SET fingerprint = {s}.fingerprint();
        PERFORM {s}.name_whole('*');
    END IF;
END $$;

-- Begins a new history, if nobody did so before.
CREATE OR REPLACE FUNCTION {s}.renew_incarnation(lost uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE {s}.meta SET incarnation = gen_random_uuid() WHERE incarnation = lost;
    IF FOUND THEN
        PERFORM {s}.name_whole('*');
    END IF;
END $$;

-- Draws a version 'everything changed' with this transaction.
CREATE OR REPLACE FUNCTION {s}.everything() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$ SELECT {s}.name_whole('*') $$;

-- Deletes a prefix of the versions, a bounded one: those superseded more than 20 minutes ago, longer than any value that
-- was read at one of them is used.
CREATE OR REPLACE FUNCTION {s}.prune() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kept bigint;
BEGIN
    -- The number is the first 8 bytes of SHA-256('trustgate prune'), as a signed number.
    IF NOT pg_try_advisory_xact_lock(-1403158803563092853) THEN
        RETURN;
    END IF;
    SELECT version INTO kept FROM {s}.version ORDER BY version OFFSET 1000 LIMIT 1;
    SELECT least(kept, coalesce(
        (SELECT max(version) FROM (SELECT version, at FROM {s}.version ORDER BY version LIMIT 1001) v
         WHERE at < clock_timestamp() - interval '20 minutes'), 0
    )) INTO kept;
    -- Only what is older than a version that itself is that old was superseded before then.
    DELETE FROM {s}.change c USING {s}.version v WHERE v.version < kept AND c.tx = v.tx AND c.tx_at = v.tx_at;
    DELETE FROM {s}.tx t USING {s}.version v WHERE v.version < kept AND t.id = v.tx AND t.at = v.tx_at;
    DELETE FROM {s}.version WHERE version < kept;
END $$;

CREATE OR REPLACE TRIGGER trustgate_row AFTER INSERT OR UPDATE OR DELETE ON {s}.api_key
    FOR EACH ROW EXECUTE FUNCTION {s}.api_key_changed();
CREATE OR REPLACE TRIGGER trustgate_truncate AFTER TRUNCATE ON {s}.api_key
    FOR EACH STATEMENT EXECUTE FUNCTION {s}.api_key_changed();
CREATE OR REPLACE TRIGGER trustgate_row AFTER INSERT OR UPDATE OR DELETE ON {s}.trust
    FOR EACH ROW EXECUTE FUNCTION {s}.trust_changed();
CREATE OR REPLACE TRIGGER trustgate_truncate AFTER TRUNCATE ON {s}.trust
    FOR EACH STATEMENT EXECUTE FUNCTION {s}.trust_changed();
DROP TRIGGER IF EXISTS trustgate_stamp ON {s}.tx;
CREATE CONSTRAINT TRIGGER trustgate_stamp AFTER INSERT ON {s}.tx DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.whole = '') EXECUTE FUNCTION {s}.stamp();
-- Always: also where changes come by replication, or a session says that it is one.
ALTER TABLE {s}.api_key ENABLE ALWAYS TRIGGER trustgate_row, ENABLE ALWAYS TRIGGER trustgate_truncate;
ALTER TABLE {s}.trust ENABLE ALWAYS TRIGGER trustgate_row, ENABLE ALWAYS TRIGGER trustgate_truncate;
ALTER TABLE {s}.tx ENABLE ALWAYS TRIGGER trustgate_stamp;

REVOKE ALL ON FUNCTION {s}.name(text, text), {s}.name_whole(text), {s}.restore_watch(), {s}.renew_incarnation(uuid),
    {s}.everything(), {s}.prune() FROM PUBLIC;
";

/// The poll. `{since}`: the version from which on versions are asked for, or the statement that finds out where to begin;
/// `{named}`: the condition on versions whose changes are asked for.
pub(super) const POLL: &str = "
SELECT {echo}::bigint,
    CASE WHEN pg_is_in_recovery() THEN 'standby'
         WHEN current_setting('transaction_read_only') = 'on' THEN 'read-only' ELSE 'primary' END,
    n.oldest, n.version, encode(n.nonce, 'hex'), m.incarnation::text, c.system_identifier,
    CASE WHEN pg_is_in_recovery() THEN 0 ELSE {timeline} END, {clock},
    (m.fingerprint = {s}.fingerprint())::int::bigint, {at}, r.version, r.nonce, r.kind, r.object
FROM (
    SELECT version, nonce, at, (SELECT min(version) FROM {s}.version) AS oldest FROM {s}.version
    ORDER BY version DESC LIMIT 1
) n
CROSS JOIN {s}.meta m
CROSS JOIN pg_control_system() c
LEFT JOIN LATERAL (
    SELECT v.version, encode(v.nonce, 'hex') AS nonce, NULL AS kind, NULL AS object FROM {s}.version v
    WHERE v.version = {since}
    UNION ALL
    SELECT v.version, encode(v.nonce, 'hex'), NULL, NULL FROM {s}.version v WHERE v.version > {since}
    UNION ALL
    SELECT v.version, NULL, t.whole, NULL FROM {s}.version v JOIN {s}.tx t ON t.id = v.tx AND t.at = v.tx_at
    WHERE v.version {named} AND t.whole <> ''
    UNION ALL
    SELECT v.version, NULL, o.kind, o.object FROM {s}.version v JOIN {s}.change o ON o.tx = v.tx AND o.tx_at = v.tx_at
    WHERE v.version {named}
    LIMIT {limit}
) r ON true
";

/// Where a replica begins: at the smallest version stamped within the last 15 minutes, longer than any value lives in Redis;
/// at the newest if there is none.
pub(super) const BEGIN: &str = "(SELECT coalesce(
    min(version) FILTER (WHERE at >= clock_timestamp() - interval '15 minutes'), max(version)) FROM {s}.version)";
