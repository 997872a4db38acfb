SELECT v.version, hex(v.nonce), m.incarnation, 0, 0, {now},
    k.id, t.id, t.enabled, hex(k.digest), k.scheme, k.scopes, k.allowed_cidrs,
    k.not_before, k.expires_at, k.revoked_at, k.scheme = 1 AND k.pepper_fingerprint IS NULL
FROM (SELECT version, nonce FROM version ORDER BY version DESC LIMIT 1) v
CROSS JOIN meta m
LEFT JOIN (api_key k JOIN trust t ON t.id = k.trust_id) ON {condition}
