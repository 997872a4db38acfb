-- Deletes a value that a replica refused, unless the value has changed since the replica read it. KEYS[1]: the Redis
-- key. ARGV[1]: the bytes that the replica read; empty if the value was not a string. ARGV[2]: the maximum number of
-- bytes that a replica reads.
local held = redis.pcall('GETRANGE', KEYS[1], 0, ARGV[2] - 1) -- an error table if the value is not a string
if type(held) ~= 'string' or held == ARGV[1] then
  return redis.call('UNLINK', KEYS[1])
end
return 0
