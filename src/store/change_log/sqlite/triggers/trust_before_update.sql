CREATE TRIGGER trust_before_update BEFORE UPDATE ON trust BEGIN
    {forget}
    INSERT INTO displaced (id)
        SELECT id FROM trust WHERE (id = NEW.id OR name = NEW.name OR rowid = NEW.rowid) AND rowid <> OLD.rowid;
END
