CREATE TRIGGER api_key_delete AFTER DELETE ON api_key BEGIN
    {draw}
    INSERT INTO change (kind, version, object)
        VALUES ('key', {v}, OLD.id), ('gone', {v}, lower(hex(OLD.digest)));
    DELETE FROM displaced WHERE id = OLD.id;
END
