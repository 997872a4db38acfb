-- Times are in microseconds since the Unix epoch, ids are lower-case UUIDs with hyphens, and lists are JSON.
CREATE TABLE schema (
    version INTEGER PRIMARY KEY, compatible_from INTEGER NOT NULL, at INTEGER NOT NULL
) STRICT;
CREATE TABLE meta (
    one INTEGER PRIMARY KEY DEFAULT 1 CHECK (one = 1), incarnation TEXT NOT NULL
) STRICT;
CREATE TABLE version (
    version INTEGER PRIMARY KEY CHECK (version > 0), nonce BLOB NOT NULL CHECK (length(nonce) = 16), at INTEGER NOT NULL
) STRICT;
CREATE TABLE setting (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE trust (
    id TEXT PRIMARY KEY CHECK (length(id) = 36),
    name TEXT NOT NULL UNIQUE CHECK (name <> ''),
    enabled INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;
CREATE TABLE api_key (
    id TEXT PRIMARY KEY CHECK (length(id) = 36),
    trust_id TEXT NOT NULL REFERENCES trust (id),
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    scheme INTEGER NOT NULL,
    hint TEXT NOT NULL,
    name TEXT,
    scopes TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(scopes)),
    allowed_cidrs TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(allowed_cidrs)),
    not_before INTEGER,
    expires_at INTEGER,
    revoked_at INTEGER,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX api_key_trust ON api_key (trust_id);
CREATE TABLE key_use (
    key_id TEXT PRIMARY KEY REFERENCES api_key (id) ON DELETE CASCADE, last_used_at INTEGER NOT NULL
) STRICT;
CREATE TABLE replica (id TEXT PRIMARY KEY, applied INTEGER NOT NULL, seen_at INTEGER NOT NULL) STRICT;
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    object TEXT NOT NULL, before TEXT, after TEXT
) STRICT;
