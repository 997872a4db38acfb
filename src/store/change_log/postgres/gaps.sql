WITH RECURSIVE wanted (home, root, name, function, type, deferred, creation) AS (
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
    )
