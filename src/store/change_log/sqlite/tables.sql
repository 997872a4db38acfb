-- The table `change` has one row per changed object: its kind (`key`, `trust`, `absent`, `gone`, or `*` for
-- everything) and its id, or its digest in lower-case hexadecimal. An empty object means the whole kind. The primary
-- key begins with the kind, so a poll can read a limited number of rows of each kind, and can see that no record
-- changed without reading the `absent` rows of a bulk insert.
CREATE TABLE IF NOT EXISTS change (
    kind TEXT NOT NULL, version INTEGER NOT NULL, object TEXT NOT NULL, PRIMARY KEY (kind, version, object)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS displaced (id TEXT NOT NULL, digest BLOB) STRICT;
