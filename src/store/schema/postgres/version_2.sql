-- A transaction is identified by its number and its start time, because a dump that is restored elsewhere can bring
-- back old numbers. Each transaction has one row with an empty `tx.whole`; a trigger on that row assigns the version
-- at commit. In every other row, `whole` is the kind of objects that changed as a whole, or `*` for everything.
ALTER TABLE {s}.meta ADD COLUMN fingerprint bytea;
ALTER TABLE {s}.replica ADD COLUMN name text NOT NULL DEFAULT '', ADD COLUMN until timestamptz NOT NULL DEFAULT '-infinity';
CREATE TABLE {s}.tx (
    id xid8 NOT NULL, at timestamptz NOT NULL, whole text NOT NULL, PRIMARY KEY (id, at, whole)
);
CREATE TABLE {s}.change (
    tx xid8 NOT NULL,
    tx_at timestamptz NOT NULL,
    ord bigint GENERATED ALWAYS AS IDENTITY,
    kind text NOT NULL,
    object text,
    PRIMARY KEY (tx, tx_at, ord)
);
CREATE TABLE {s}.writer_lock ();
ALTER TABLE {s}.version ADD COLUMN tx xid8, ADD COLUMN tx_at timestamptz;
CREATE SEQUENCE {s}.version_number;
SELECT setval('{s}.version_number', max(version)) FROM {s}.version;
