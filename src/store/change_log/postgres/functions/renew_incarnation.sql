CREATE OR REPLACE FUNCTION {s}.renew_incarnation(lost uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    UPDATE {s}.meta SET incarnation = gen_random_uuid() WHERE incarnation = lost;
    IF FOUND THEN
        PERFORM {s}.everything();
    END IF;
END
$body$;
