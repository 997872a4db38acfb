CREATE TRIGGER api_key_update AFTER UPDATE ON api_key WHEN
    (OLD.id, OLD.trust_id, OLD.digest, OLD.scheme, OLD.scopes, OLD.allowed_cidrs,
        OLD.not_before, OLD.expires_at, OLD.revoked_at) IS NOT
    (NEW.id, NEW.trust_id, NEW.digest, NEW.scheme, NEW.scopes, NEW.allowed_cidrs,
        NEW.not_before, NEW.expires_at, NEW.revoked_at)
    OR EXISTS (SELECT 1 FROM displaced)
BEGIN
    {draw}
    INSERT INTO change (kind, version, object) VALUES ('absent', {v}, lower(hex(NEW.digest)));
    INSERT INTO change (kind, version, object)
        SELECT 'key', {v}, OLD.id UNION SELECT 'key', {v}, NEW.id UNION SELECT 'key', {v}, d.id FROM {removed key};
    INSERT INTO change (kind, version, object)
        SELECT 'gone', {v}, lower(hex(OLD.digest)) WHERE OLD.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL
        UNION SELECT 'gone', {v}, lower(hex(d.digest)) FROM {removed key}
            AND (d.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL);
    {forget}
END
