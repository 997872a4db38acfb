-- The first row is always present. The next rows are the newest versions, the first version if it is not among them,
-- the kinds of which too many objects changed, and the changes of the other kinds. The last SELECT is for kinds that
-- only a newer release knows.
{with}
SELECT ?1, CASE WHEN ?3 THEN 'primary' ELSE 'read-only' END, (SELECT min(version) FROM version),
    v.version, hex(v.nonce), m.incarnation, 0, 0, {now}, {in_force}, v.at, NULL, NULL, NULL, NULL,
    nullif(hex(m.pepper_fingerprint), ''), nullif(hex(m.previous_pepper_fingerprint), '')
FROM (SELECT version, nonce, at FROM version ORDER BY version DESC LIMIT 1) v CROSS JOIN meta m
UNION ALL
SELECT {nothing}, v.version, hex(v.nonce), NULL, NULL, NULL, NULL
FROM (SELECT version, nonce FROM version WHERE version >= {first} ORDER BY version DESC LIMIT {each_max}) v
UNION ALL
SELECT {nothing}, v.version, hex(v.nonce), NULL, NULL, NULL, NULL
FROM version v WHERE v.version = {first} AND (
    SELECT version FROM version WHERE version >= {first} ORDER BY version LIMIT 1 OFFSET {each_max}
) IS NOT NULL
UNION ALL
SELECT {nothing}, (SELECT max(c.version) FROM change c WHERE c.kind = k.kind), NULL, k.kind, NULL, NULL, NULL
FROM {kinds} WHERE {too_many}
UNION ALL
SELECT {nothing}, c.version, NULL, c.kind, nullif(c.object, ''), NULL, NULL
FROM {kinds} CROSS JOIN change c WHERE NOT {too_many} AND c.kind = k.kind AND c.version > {known}
UNION ALL
SELECT {nothing}, max(c.version), NULL, '*', NULL, NULL, NULL
FROM (SELECT 1 FROM schema WHERE version > {version} LIMIT 1) s CROSS JOIN change c
WHERE c.version > {known} AND c.kind NOT IN ('*', 'absent', 'gone', 'key', 'trust')
HAVING max(c.version) IS NOT NULL
LIMIT {rows}
