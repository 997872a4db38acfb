ALTER TABLE meta ADD COLUMN pepper_fingerprint BLOB CHECK (length(pepper_fingerprint) = 8);
ALTER TABLE meta ADD COLUMN previous_pepper_fingerprint BLOB CHECK (length(previous_pepper_fingerprint) = 8);
ALTER TABLE api_key ADD COLUMN pepper_fingerprint BLOB CHECK (length(pepper_fingerprint) = 8);
ALTER TABLE api_key ADD COLUMN metadata TEXT CHECK (metadata IS NULL OR json_valid(metadata));
ALTER TABLE api_key ADD COLUMN rotated_from TEXT CHECK (length(rotated_from) = 36);
ALTER TABLE api_key ADD COLUMN limit_requests INTEGER;
ALTER TABLE api_key ADD COLUMN limit_unit TEXT;
ALTER TABLE trust ADD COLUMN external_id TEXT;
ALTER TABLE trust ADD COLUMN limit_requests INTEGER;
ALTER TABLE trust ADD COLUMN limit_unit TEXT;
CREATE INDEX api_key_pepper ON api_key (pepper_fingerprint)
    WHERE pepper_fingerprint IS NOT NULL AND revoked_at IS NULL;
