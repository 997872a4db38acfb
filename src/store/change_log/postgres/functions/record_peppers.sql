-- Records the peppers of keys. The role of `serve` calls this function; it can change nothing else in a key. The change
-- gets no version, because no decision reads this column. The function skips keys that another replica has locked.
CREATE OR REPLACE FUNCTION {s}.record_peppers(keys uuid[], made_under bytea[], current bytea) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    UPDATE {s}.api_key k SET pepper_fingerprint = proven.fingerprint
        FROM unnest(keys, made_under) AS proven (id, fingerprint)
        WHERE k.id = proven.id AND k.id IN (
            SELECT id FROM {s}.api_key WHERE id = ANY (keys) AND scheme = 1 AND pepper_fingerprint IS NULL
                ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
        );
    IF current = ANY (made_under) THEN
        PERFORM {s}.hold_pepper(current);
    END IF;
END
$body$;
