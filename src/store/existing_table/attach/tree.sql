WITH RECURSIVE tree (oid, depth) AS (
    SELECT c.oid, 0 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
    UNION ALL
    SELECT i.inhrelid, depth + 1 FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid
)
SELECT format('%I.%I', n.nspname, c.relname), c.relispartition, c.relkind::text, c.relrowsecurity, ARRAY(
    SELECT g.tgname::text FROM pg_trigger g WHERE g.tgrelid = c.oid AND g.tgname = ANY ($3)
        AND g.tgfoid IS DISTINCT FROM to_regprocedure('{s}.attached_changed()')
)
FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY tree.depth, c.oid
