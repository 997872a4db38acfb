CREATE TRIGGER trust_insert AFTER INSERT ON trust BEGIN
    {draw}
    INSERT INTO change (kind, version, object)
        SELECT 'trust', {v}, NEW.id UNION SELECT 'trust', {v}, d.id FROM {removed trust};
    INSERT INTO change (kind, version, object) SELECT 'absent', {v}, lower(hex(digest)) FROM api_key
        WHERE trust_id = NEW.id AND NOT EXISTS (SELECT 1 FROM displaced WHERE id = NEW.id);
    {forget}
END
