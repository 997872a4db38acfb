ALTER TABLE {s}.meta
    ADD COLUMN pepper_fingerprint bytea CHECK (octet_length(pepper_fingerprint) = 8),
    ADD COLUMN previous_pepper_fingerprint bytea CHECK (octet_length(previous_pepper_fingerprint) = 8);
ALTER TABLE {s}.api_key
    ADD COLUMN pepper_fingerprint bytea,
    ADD COLUMN metadata jsonb,
    ADD COLUMN rotated_from uuid,
    ADD COLUMN limit_requests bigint,
    ADD COLUMN limit_unit text;
ALTER TABLE {s}.trust
    ADD COLUMN external_id text,
    ADD COLUMN limit_requests bigint,
    ADD COLUMN limit_unit text;
ALTER TABLE {s}.api_key ADD CONSTRAINT api_key_pepper_fingerprint_check
    CHECK (octet_length(pepper_fingerprint) = 8) NOT VALID;
