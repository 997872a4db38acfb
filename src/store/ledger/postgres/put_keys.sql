INSERT INTO {s}.api_key
    (id, trust_id, digest, scheme, pepper_fingerprint, hint, name, scopes, allowed_cidrs, created_at, not_before,
    expires_at, revoked_at)
SELECT n.id, n.trust_id, n.digest, n.scheme, n.pepper, n.hint, n.name,
    ARRAY(SELECT json_array_elements_text(n.scopes::json)),
    ARRAY(SELECT json_array_elements_text(n.cidrs::json))::cidr[],
    to_timestamp(0) + n.created_at * interval '1 microsecond',
    to_timestamp(0) + n.not_before * interval '1 microsecond',
    to_timestamp(0) + n.expires_at * interval '1 microsecond',
    to_timestamp(0) + n.revoked_at * interval '1 microsecond'
FROM unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::int2[], $5::text[], $6::text[], $7::text[], $8::text[],
    $9::int8[], $10::int8[], $11::int8[], $12::int8[], $13::bytea[])
    AS n (id, trust_id, digest, scheme, hint, name, scopes, cidrs, created_at, not_before, expires_at, revoked_at,
        pepper)
