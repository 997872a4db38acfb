CREATE OR REPLACE FUNCTION {s}.api_key_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF TG_OP = 'UPDATE' AND (
        OLD.id, OLD.trust_id, OLD.digest, OLD.scheme, OLD.scopes, OLD.allowed_cidrs,
        OLD.not_before, OLD.expires_at, OLD.revoked_at
    ) IS NOT DISTINCT FROM (
        NEW.id, NEW.trust_id, NEW.digest, NEW.scheme, NEW.scopes, NEW.allowed_cidrs,
        NEW.not_before, NEW.expires_at, NEW.revoked_at
    ) THEN
        RETURN NULL;
    END IF;
    INSERT INTO {s}.tx (id, at, whole) VALUES (pg_current_xact_id(), transaction_timestamp(), '')
        ON CONFLICT DO NOTHING;
    IF TG_OP <> 'INSERT' THEN
        PERFORM {s}.note('key', OLD.id::text);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.id IS DISTINCT FROM OLD.id THEN
        PERFORM {s}.note('key', NEW.id::text);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM {s}.note('absent', encode(NEW.digest, 'hex'));
    END IF;
    IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE' AND (NEW.digest IS DISTINCT FROM OLD.digest OR NEW.revoked_at IS NOT NULL)
    THEN
        PERFORM {s}.note('gone', encode(OLD.digest, 'hex'));
    END IF;
    RETURN NULL;
END
$body$;
