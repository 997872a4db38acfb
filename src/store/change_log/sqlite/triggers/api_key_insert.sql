CREATE TRIGGER api_key_insert AFTER INSERT ON api_key BEGIN
    {draw}
    INSERT INTO change (kind, version, object) VALUES ('absent', {v}, lower(hex(NEW.digest)));
    INSERT INTO change (kind, version, object) SELECT 'key', {v}, d.id FROM {removed key};
    INSERT INTO change (kind, version, object) SELECT 'gone', {v}, lower(hex(d.digest)) FROM {removed key}
        AND (d.digest <> NEW.digest OR NEW.revoked_at IS NOT NULL);
    {forget}
END
