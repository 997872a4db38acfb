SELECT i.name FROM (SELECT 'api_key' AS on_table UNION ALL SELECT 'trust') w
JOIN pragma_index_list(w.on_table) i ON i."unique"
WHERE (
    w.on_table,
    (SELECT group_concat(coalesce(c.name, '') || ' ' || c.coll) FROM pragma_index_xinfo(i.name) c WHERE c.key)
) NOT IN (
    VALUES ('api_key', 'id BINARY'), ('api_key', 'digest BINARY'), ('trust', 'id BINARY'), ('trust', 'name BINARY')
)
