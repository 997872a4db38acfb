-- Deletes old versions and their changes, a limited number in each call. Keeps all versions of the last 20 minutes and
-- the newest version before them, because a starting replica reads the last 15 minutes, and a running replica polls
-- from the version that it applied last. The number of the lock is the first 8 bytes of SHA-256('trustgate prune').
CREATE OR REPLACE FUNCTION {s}.prune() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
SET search_path = pg_catalog, pg_temp AS $body$
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
$body$;
