-- Replaces an older value. KEYS[1]: its name. ARGV[1]: the new value. ARGV[2]: its lifetime in milliseconds.
-- The present value stays if it has the same layout (byte 1) and lineage (bytes 34 to 61) and is not older (bytes 62 to 77:
-- 16 hexadecimal digits, which sort the same in every locale; a Lua number is exact only up to 2^53).
local held = redis.pcall('GETRANGE', KEYS[1], 0, 76) -- an error table if the value is not a string
local function same(first, last)
  return string.sub(held, first, last) == string.sub(ARGV[1], first, last)
end
if type(held) == 'string' and same(1, 1) and same(34, 61) and string.sub(held, 62, 77) >= string.sub(ARGV[1], 62, 77) then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
