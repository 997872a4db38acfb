CREATE TRIGGER trust_delete AFTER DELETE ON trust BEGIN
    {draw}
    INSERT INTO change (kind, version, object) VALUES ('trust', {v}, OLD.id);
    DELETE FROM displaced WHERE id = OLD.id;
END
