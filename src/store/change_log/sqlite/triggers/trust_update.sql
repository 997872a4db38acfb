CREATE TRIGGER trust_update AFTER UPDATE ON trust
WHEN (OLD.id, OLD.enabled) IS NOT (NEW.id, NEW.enabled) OR EXISTS (SELECT 1 FROM displaced)
BEGIN
    {draw}
    INSERT INTO change (kind, version, object)
        SELECT 'trust', {v}, OLD.id UNION SELECT 'trust', {v}, NEW.id
        UNION SELECT 'trust', {v}, d.id FROM {removed trust};
    INSERT INTO change (kind, version, object) SELECT 'absent', {v}, lower(hex(digest)) FROM api_key
        WHERE trust_id = NEW.id AND OLD.id <> NEW.id;
    {forget}
END
