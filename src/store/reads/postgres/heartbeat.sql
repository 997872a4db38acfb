WITH dead AS (
    DELETE FROM {s}.replica WHERE until < statement_timestamp() - interval '1 day' AND id <> '{replica}'
)
INSERT INTO {s}.replica (id, name, applied, seen_at, until)
VALUES ('{replica}', (SELECT coalesce(string_agg(chr(c), '' ORDER BY o), '')
            FROM unnest(ARRAY[{name}]::int[]) WITH ORDINALITY AS u (c, o)),
    {applied}, statement_timestamp(), statement_timestamp() + {lasts} * interval '1 microsecond')
ON CONFLICT (id) DO UPDATE SET applied = excluded.applied, seen_at = excluded.seen_at, until = excluded.until
