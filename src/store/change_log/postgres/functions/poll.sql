-- Returns the versions after `since` and the changes that they made, in at most `rows_max` rows.
--
-- STABLE: all statements in the function see the snapshot of the calling statement. A connection plans each statement
-- once, so the plan must stay efficient while the tables grow: use indexes, and no JIT compilation, which takes longer
-- than the statements themselves.
CREATE OR REPLACE FUNCTION {s}.poll(since bigint, rows_max bigint) RETURNS TABLE (
    state text, oldest bigint, newest bigint, newest_nonce text, incarnation text, system bigint, timeline bigint,
    clock bigint, watched bigint, stamped_at bigint, version bigint, nonce text, kind text, object text
)
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
SET search_path = pg_catalog, pg_temp AS $body$
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
$body$;
