WITH
    oldest AS MATERIALIZED (SELECT version, at FROM version ORDER BY version LIMIT 1000 + 1),
    recent AS (SELECT min(version) AS version FROM oldest WHERE at >= {now} - {old})
DELETE FROM version WHERE version < (
    SELECT max(o.version) FROM oldest o CROSS JOIN recent r WHERE r.version IS NULL OR o.version < r.version
);
DELETE FROM change WHERE kind IN (
    WITH RECURSIVE kinds (kind) AS (
        SELECT min(kind) FROM change
        UNION ALL
        SELECT (SELECT min(c.kind) FROM change c WHERE c.kind > k.kind) FROM kinds k WHERE k.kind IS NOT NULL
    )
    SELECT kind FROM kinds WHERE kind IS NOT NULL
) AND version < (SELECT min(version) FROM version)
