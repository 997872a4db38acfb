-- Deletes what its reader found bad, unless something else stands there by now. KEYS[1]: its name. ARGV[1]: what was
-- read, or nothing where it could not be read as a text. ARGV[2]: how many bytes were asked for.
local held = redis.pcall('GETRANGE', KEYS[1], 0, ARGV[2] - 1) -- a table where it is still no text
if type(held) ~= 'string' or held == ARGV[1] then
  return redis.call('UNLINK', KEYS[1])
end
return 0
