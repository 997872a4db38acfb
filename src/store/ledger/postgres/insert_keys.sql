INSERT INTO {s}.api_key
    (id, trust_id, digest, scheme, pepper_fingerprint, hint, name, scopes, allowed_cidrs, not_before, expires_at)
SELECT n.id, $1, n.digest, n.scheme, n.pepper, n.hint, n.name,
    ARRAY(SELECT json_array_elements_text(n.scopes::json)),
    ARRAY(SELECT json_array_elements_text(n.cidrs::json))::cidr[],
    to_timestamp(0) + n.not_before * interval '1 microsecond',
    now() + n.expires_in * interval '1 microsecond'
FROM unnest($2::uuid[], $3::bytea[], $4::int2[], $5::text[], $6::text[], $7::text[], $8::text[],
    $9::int8[], $10::int8[], $11::bytea[])
    AS n (id, digest, scheme, hint, name, scopes, cidrs, not_before, expires_in, pepper)
ON CONFLICT (digest) DO NOTHING
