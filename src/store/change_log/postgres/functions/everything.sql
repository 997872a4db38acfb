CREATE OR REPLACE FUNCTION {s}.everything() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    INSERT INTO {s}.tx (id, at, whole)
        SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', '*']) AS kind
        ON CONFLICT DO NOTHING;
END
$body$;
