CREATE OR REPLACE FUNCTION {s}.gaps() RETURNS TABLE (relation regclass, trigger name, disabled name, creation text, problem text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $body$
#variable_conflict use_column
BEGIN
    RETURN QUERY {gaps};
END
$body$;
