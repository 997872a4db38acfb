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
$mend$;
