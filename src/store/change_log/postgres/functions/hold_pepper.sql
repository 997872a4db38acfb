-- Records `made_under` as the pepper for new keys if no pepper is recorded, and returns the recorded pepper. Concurrent
-- calls wait for each other. If keys were issued without a pepper, the function records "no pepper" as the previous
-- pepper. Imported digests have an empty hint and do not count as issued.
CREATE OR REPLACE FUNCTION {s}.hold_pepper(made_under bytea) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF made_under IS NOT NULL THEN
        UPDATE {s}.meta SET pepper_fingerprint = made_under, previous_pepper_fingerprint = CASE
                WHEN EXISTS (SELECT FROM {s}.api_key WHERE scheme = 0 AND hint <> '') THEN {no_pepper} END
            WHERE pepper_fingerprint IS NULL;
    END IF;
    RETURN (SELECT encode(pepper_fingerprint, 'hex') FROM {s}.meta);
END
$body$;
