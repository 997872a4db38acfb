-- A record combines a key with its trust, so truncating either table makes all records out of date.
CREATE OR REPLACE FUNCTION {s}.truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    INSERT INTO {s}.tx (id, at, whole)
        SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', 'key', 'trust']) AS kind
        ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$body$;
