-- If a transaction changes more than 10 000 objects of one kind, the function records that the whole kind changed,
-- because no poll reads that many rows. The function counts in a session setting, which any client can change. A wrong
-- count makes the record coarser or finer, but not incorrect.
CREATE OR REPLACE FUNCTION {s}.note(kind text, object text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    counter CONSTANT text := 'trustgate.{s}_' || kind;
    counted CONSTANT text := current_setting(counter, true);
    listed CONSTANT bigint := CASE WHEN counted ~ '^[0-9]{1,9}$' THEN counted::bigint ELSE 0 END;
BEGIN
    IF listed >= 10000 THEN
        INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), kind)
            ON CONFLICT DO NOTHING;
    ELSE
        PERFORM set_config(counter, (listed + 1)::text, true);
        INSERT INTO {s}.change (tx, tx_at, kind, object)
            VALUES (pg_current_xact_id(), transaction_timestamp(), kind, object);
    END IF;
END
$body$;
