CREATE TRIGGER api_key_before_insert BEFORE INSERT ON api_key BEGIN
    {forget}
    INSERT INTO displaced (id, digest)
        SELECT id, digest FROM api_key WHERE id = NEW.id OR digest = NEW.digest OR rowid = NEW.rowid;
END
