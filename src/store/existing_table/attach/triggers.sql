SELECT owner, string_agg(DISTINCT relation, ', '),
    array_agg(format('DROP TRIGGER %I ON %s', tgname, relation) ORDER BY relation, tgname)
FROM (
    SELECT c.relowner::regrole::text AS owner, format('%I.%I', n.nspname, c.relname) AS relation, g.tgname
    FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE g.tgfoid = to_regprocedure('{s}.attached_changed()') AND g.tgparentid = 0
) AS theirs GROUP BY owner ORDER BY owner
