-- The attributes and settings are those of `poll` (poll.sql), for the same reasons.
--
-- Altering an object and restoring it within one transaction still changes the fingerprint, because xmin is the
-- transaction that wrote the catalog row. Renaming or dropping a column changes only the catalog row of that column, so
-- the fingerprint also includes columns, but only those of the root tables: the columns of partitions and child tables
-- follow their parents.
CREATE OR REPLACE FUNCTION {s}.fingerprint() RETURNS bytea
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
SET search_path = pg_catalog, pg_temp AS $body$
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
$body$;
