CREATE TABLE {s}.schema (
    version bigint PRIMARY KEY, compatible_from bigint NOT NULL, at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {s}.meta (
    one boolean PRIMARY KEY DEFAULT true CHECK (one), incarnation uuid NOT NULL
);
CREATE TABLE {s}.version (
    version bigint PRIMARY KEY CHECK (version > 0),
    nonce bytea NOT NULL CHECK (octet_length(nonce) = 16),
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE {s}.setting (name text PRIMARY KEY, value bytea NOT NULL);
CREATE TABLE {s}.trust (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name <> ''),
    enabled boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE {s}.api_key (
    id uuid PRIMARY KEY,
    trust_id uuid NOT NULL REFERENCES {s}.trust (id),
    digest bytea NOT NULL UNIQUE CHECK (octet_length(digest) = 32),
    scheme smallint NOT NULL,
    hint text NOT NULL,
    name text,
    scopes text[] NOT NULL DEFAULT '{}',
    allowed_cidrs cidr[] NOT NULL DEFAULT '{}',
    not_before timestamptz CHECK (isfinite(not_before)),
    expires_at timestamptz CHECK (isfinite(expires_at)),
    revoked_at timestamptz CHECK (isfinite(revoked_at)),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_key_trust ON {s}.api_key (trust_id);
CREATE TABLE {s}.key_use (
    key_id uuid PRIMARY KEY REFERENCES {s}.api_key (id) ON DELETE CASCADE, last_used_at timestamptz NOT NULL
);
CREATE TABLE {s}.replica (id uuid PRIMARY KEY, applied bigint NOT NULL, seen_at timestamptz NOT NULL);
CREATE TABLE {s}.audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    action text NOT NULL,
    object text NOT NULL,
    before jsonb,
    after jsonb
);
