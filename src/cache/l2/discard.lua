-- Deletes a value that its reader refused, unless it has changed since. KEYS[1]: its name. ARGV[1]: the bytes that were
-- read; empty if the value was not a string. ARGV[2]: the maximum number of bytes that were read.
local held = redis.pcall('GETRANGE', KEYS[1], 0, ARGV[2] - 1) -- an error table if the value is not a string
if type(held) ~= 'string' or held == ARGV[1] then
  return redis.call('UNLINK', KEYS[1])
end
return 0
