CREATE TRIGGER trust_before_insert BEFORE INSERT ON trust BEGIN
    {forget}
    INSERT INTO displaced (id) SELECT id FROM trust WHERE id = NEW.id OR name = NEW.name OR rowid = NEW.rowid;
END
