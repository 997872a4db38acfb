-- Only releases with table version 3 call this function. Such a release may still be running, or an operator may roll
-- back to it.
CREATE OR REPLACE FUNCTION {s}.find(digests bytea[], key uuid) RETURNS TABLE (
    version bigint, nonce text, incarnation text, system bigint, timeline bigint, clock bigint,
    key_id text, trust_id text, trust_enabled bigint, digest text, scheme bigint, scopes text, allowed_cidrs text,
    not_before bigint, expires_at bigint, revoked_at bigint
)
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
SET plan_cache_mode = force_generic_plan SET search_path = pg_catalog, pg_temp AS $body$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT v.version, encode(v.nonce, 'hex'), m.incarnation::text, c.system_identifier,
        ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint,
        (extract(epoch FROM statement_timestamp()) * 1000000)::bigint,
        k.id::text, t.id::text, t.enabled::int::bigint, encode(k.digest, 'hex'), k.scheme::bigint,
        array_to_json(k.scopes)::text, array_to_json(k.allowed_cidrs)::text,
        {not_before}, {expires_at}, {revoked_at}
    FROM (SELECT version, nonce FROM {s}.version ORDER BY version DESC LIMIT 1) v
    CROSS JOIN {s}.meta m
    CROSS JOIN pg_control_system() c
    LEFT JOIN (
        SELECT * FROM {s}.api_key WHERE digest = ANY (digests)
        UNION ALL
        SELECT * FROM {s}.api_key WHERE id = key
    ) k JOIN {s}.trust t ON t.id = k.trust_id ON true;
END
$body$;
