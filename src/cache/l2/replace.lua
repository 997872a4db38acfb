-- Sets a value, unless Redis already has one that is at least as new. KEYS[1]: the Redis key. ARGV[1]: the new value.
-- ARGV[2]: the lifetime of the new value, in milliseconds.
-- The present value stays if it has the same layout (byte 1) and lineage (bytes 34 to 61) and its version (bytes 62 to
-- 77) is not lower. The version consists of 16 hexadecimal digits, which sort the same in every locale; a Lua number
-- would be exact only up to 2^53.
local held = redis.pcall('GETRANGE', KEYS[1], 0, 76) -- an error table if the value is not a string
local function same(first, last)
  return string.sub(held, first, last) == string.sub(ARGV[1], first, last)
end
if type(held) == 'string' and same(1, 1) and same(34, 61) and string.sub(held, 62, 77) >= string.sub(ARGV[1], 62, 77) then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
