CREATE OR REPLACE FUNCTION {s}.attached_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    old_id text;
    new_id text;
    old_digest text;
    new_digest text;
    revoked boolean;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO {s}.tx (id, at, whole)
            SELECT pg_current_xact_id(), transaction_timestamp(), kind FROM unnest(ARRAY['', 'key', 'trust']) AS kind
            ON CONFLICT DO NOTHING;
        RETURN NULL;
    END IF;
    BEGIN
        IF TG_OP = 'UPDATE' AND {old row} IS NOT DISTINCT FROM {new row} THEN
            RETURN NULL;
        END IF;
        IF TG_OP <> 'INSERT' THEN
            old_id := OLD.{id}::text;
            old_digest := {old digest};
        END IF;
        IF TG_OP <> 'DELETE' THEN
            new_id := NEW.{id}::text;
            new_digest := {new digest};
            revoked := {revoked};
        END IF;
    EXCEPTION WHEN OTHERS THEN
        PERFORM {s}.everything();
        RETURN NULL;
    END;
    IF TG_OP = 'INSERT' AND new_digest IS NULL THEN
        RETURN NULL;
    END IF;
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '')
        ON CONFLICT DO NOTHING;
    IF TG_OP <> 'INSERT' THEN
        PERFORM {s}.note('key', old_id);
    END IF;
    IF TG_OP = 'UPDATE' AND new_id IS DISTINCT FROM old_id THEN
        PERFORM {s}.note('key', new_id);
    END IF;
    IF TG_OP <> 'DELETE' AND new_digest ~ '^[0-9a-f]{64}$' THEN
        PERFORM {s}.note('absent', new_digest);
    END IF;
    IF TG_OP <> 'INSERT' AND old_digest ~ '^[0-9a-f]{64}$'
        AND (TG_OP = 'DELETE' OR old_digest IS DISTINCT FROM new_digest OR revoked)
    THEN
        PERFORM {s}.note('gone', old_digest);
    END IF;
    RETURN NULL;
END
$body$
