-- Runs once per transaction, at the commit. PostgreSQL releases the lock when the commit becomes visible, so versions
-- are in commit order. A visible commit must be on disk, so the function turns off asynchronous commit. A client can
-- run this trigger before the commit (SET CONSTRAINTS), so an idle timeout keeps such a client from holding the lock
-- indefinitely. PREPARE TRANSACTION would also keep the lock, but PostgreSQL rejects it after a NOTIFY.
CREATE OR REPLACE FUNCTION {s}.stamp() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF NEW.whole <> '' THEN
        RETURN NULL;
    END IF;
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
    IF current_setting('idle_in_transaction_session_timeout') = '0' THEN
        PERFORM set_config('idle_in_transaction_session_timeout', '3s', true);
    END IF;
    PERFORM pg_notify('{s}', '');
    LOCK TABLE {s}.writer_lock IN SHARE ROW EXCLUSIVE MODE;
    INSERT INTO {s}.version (version, nonce, at, tx, tx_at) VALUES (
        nextval('{s}.version_number'), uuid_send(gen_random_uuid()), clock_timestamp(), NEW.id, NEW.at
    );
    RETURN NULL;
END
$body$;
