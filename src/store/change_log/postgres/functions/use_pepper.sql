-- Records the pepper `made_under` for new keys, and returns the pepper that was recorded before.
CREATE OR REPLACE FUNCTION {s}.use_pepper(made_under bytea) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    before bytea;
BEGIN
    SELECT pepper_fingerprint INTO before FROM {s}.meta FOR UPDATE;
    IF before IS NULL THEN
        PERFORM {s}.hold_pepper(made_under);
    ELSE
        UPDATE {s}.meta SET pepper_fingerprint = made_under, previous_pepper_fingerprint = before
            WHERE pepper_fingerprint <> made_under;
    END IF;
    RETURN encode(before, 'hex');
END
$body$;
