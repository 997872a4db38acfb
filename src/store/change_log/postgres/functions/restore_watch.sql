-- The function computes the fingerprint before it checks the triggers. A change in between makes the fingerprint differ
-- again, so the next poll detects it.
CREATE OR REPLACE FUNCTION {s}.restore_watch() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
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
$body$;
