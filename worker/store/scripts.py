"""The Lua scripts of `worker.store.store`, which says what the keys are and what the scripts guarantee. The store runs
each script as a whole, with no other command in between."""

from __future__ import annotations

from schemas.state import MAX_EVENTS_BYTES, MAX_HEADER_BYTES

MAX_OWNER_BYTES = 1_000

# `strange`: the first of the stream's keys that no worker wrote, as {key, type}; nil where there is none. All scripts
# that use it get the stream's keys in this order. A token has at most 15 digits, because Lua, whose numbers are floats,
# cannot tell larger ones apart.
_FOREIGN = """
local function is_token(text)
  return string.match(text, '^[1-9]%d*$') and #text <= 15
end
local function foreign()
  local types = {'hash', 'string', 'list', 'string', 'string'}
  for i, key in ipairs(KEYS) do
    local found = redis.call('TYPE', key)['ok']
    if found ~= 'none' and found ~= types[i] then return {key, found} end
  end
  local token = redis.call('HGET', KEYS[1], 'token') or ''
  if not is_token(token) and redis.call('EXISTS', KEYS[1]) == 1 then
    return {KEYS[1], 'hash without a token'}
  end
end
local strange = foreign()
"""

# Read a string, or a field of the stream's hash. Empty where it has more bytes than it may: readers take that for
# damaged.
_WITHIN = f"""
local most_of = {{header = {MAX_HEADER_BYTES}, event = {MAX_EVENTS_BYTES}, owner = {MAX_OWNER_BYTES}}}
local function within(key, most)
  if redis.call('STRLEN', key) > tonumber(most) then return '' end
  return redis.call('GET', key)
end
local function field(name)
  if redis.call('HSTRLEN', KEYS[1], name) > most_of[name] then return '' end
  return redis.call('HGET', KEYS[1], name)
end
"""

# ARGV: owner; 'any', or 'known' where a new stream must not begin, or 'last' where the stream is about to be deleted;
# the most bytes of tensors that are read.
# A full store refuses a script if the first command that writes may need memory, and looks at no later one. HDEL needs
# none, so that 'last' works in a full store.
CLAIM = (
    _FOREIGN
    + _WITHIN
    + """
if strange then return strange end
if ARGV[2] ~= 'any' and redis.call('EXISTS', KEYS[1]) == 0 then return {0, false, false, false, false, false} end
if ARGV[2] == 'last' then redis.call('HDEL', KEYS[1], 'written') end
if redis.call('EXISTS', KEYS[1]) == 0 then
  local last = within(KEYS[5], most_of['event'])
  if last == '' then last = redis.call('GETRANGE', KEYS[5], 0, 15) end
  local number, event = string.match(last or '', '^(%d+)\\n?(.*)$')
  if number and is_token(number) then redis.call('HSET', KEYS[1], 'token', number) end
  if event and event ~= '' then redis.call('HSET', KEYS[1], 'event', event) end
  redis.call('DEL', KEYS[5])
end
local before = field('owner')
local token = redis.call('HINCRBY', KEYS[1], 'token', 1)
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
redis.call('HDEL', KEYS[1], 'written')
return {token, field('header'), within(KEYS[2], ARGV[3]), field('event'), within(KEYS[4], ARGV[3]), before}
"""
)

# ARGV: the most bytes of tensors that are read.
READ = (
    _FOREIGN
    + _WITHIN
    + """
if strange then return strange end
local token = tonumber(redis.call('HGET', KEYS[1], 'token')) or 0
return {token, field('header'), within(KEYS[2], ARGV[1]), field('event'), within(KEYS[4], ARGV[1]), field('owner')}
"""
)

OVERVIEW = (
    _FOREIGN
    + _WITHIN
    + """
if strange then return strange end
local token = tonumber(redis.call('HGET', KEYS[1], 'token')) or 0
return {token, field('owner'), field('header'), redis.call('STRLEN', KEYS[2]), redis.call('LLEN', KEYS[3])}
"""
)

# KEYS: a stream's snapshots. ARGV: which one, 0 being the newest; the most bytes that are read. Returns how many there
# are, and that one: empty where it has more bytes. Returns nothing where the key is something else.
SNAPSHOT = """
local count = redis.pcall('LLEN', KEYS[1])
if type(count) == 'table' then return {} end
local content = redis.call('LINDEX', KEYS[1], ARGV[1]) or ''
if #content > tonumber(ARGV[2]) then content = '' end
return {count, content}
"""

# KEYS: a stream's snapshots. ARGV: the most that are read. Returns the description of each, which `worker.store.store`
# puts before the tensors: empty where it is too long. Returns nothing where the key is something else.
SAID = f"""
local count = redis.pcall('LLEN', KEYS[1])
if type(count) == 'table' then return false end
local said = {{}}
for i = 0, math.min(count, tonumber(ARGV[1])) - 1 do
  local content = redis.call('LINDEX', KEYS[1], i)
  local a, b, c, d = string.byte(content, 1, 4)
  local length = d and a + 256 * (b + 256 * (c + 256 * d)) or 0
  said[i + 1] = length <= {MAX_HEADER_BYTES} and string.sub(content, 5, 4 + length) or ''
end
return said
"""

# ARGV: 1 token, 2 header, 3 event, 4 tensors or '', 5 seconds to live or 0, 6 snapshot or '', 7 snapshots to keep,
# 8 number, 9 approved or '', 10 '1' where the stored approved ones have to stay, 11 `Write.after` or ''.
# Returns 1 where it is written, 0 where it is refused, 2 where what has to stay is gone or of an older write.
# A write with the stored number is the same write come twice, and succeeds, only if the header is the same too.
# Only types of keys that this write changes are checked: the claim has checked all, and each check takes microseconds.
WRITE = """
local function taken(i, kind)
  local found = redis.call('TYPE', KEYS[i])['ok']
  return found ~= 'none' and found ~= kind
end
local stored = redis.pcall('HMGET', KEYS[1], 'token', 'written')
if stored[1] ~= ARGV[1] then return 0 end
if stored[2] == ARGV[8] then return redis.call('HGET', KEYS[1], 'header') == ARGV[2] and 1 or 0 end
if stored[2] and (tonumber(stored[2]) or math.huge) > tonumber(ARGV[8]) then return 0 end
if ARGV[4] ~= '' and taken(2, 'string') or ARGV[9] ~= '' and taken(4, 'string') then return 0 end
if (ARGV[6] ~= '' or ARGV[5] ~= '0') and taken(3, 'list') then return 0 end
if ARGV[4] == '' and redis.call('EXISTS', KEYS[2]) == 0 then return 2 end
if ARGV[10] == '1' and redis.call('EXISTS', KEYS[4]) == 0 then return 2 end
if (ARGV[4] == '' or ARGV[10] == '1') and ARGV[11] ~= '' and (stored[2] or '0') ~= ARGV[11] then return 2 end
redis.call('HSET', KEYS[1], 'header', ARGV[2], 'event', ARGV[3], 'written', ARGV[8])
if ARGV[4] ~= '' then redis.call('SET', KEYS[2], ARGV[4]) end
if ARGV[9] ~= '' then redis.call('SET', KEYS[4], ARGV[9]) end
if ARGV[6] ~= '' then
  redis.call('LPUSH', KEYS[3], ARGV[6])
  redis.call('LTRIM', KEYS[3], 0, ARGV[7] - 1)
end
if ARGV[5] == '0' then
  redis.call('PERSIST', KEYS[2])
  redis.call('PERSIST', KEYS[3])
else
  redis.call('EXPIRE', KEYS[2], ARGV[5])
  redis.call('EXPIRE', KEYS[3], ARGV[5])
end
return 1
"""

# ARGV: token, last event. Deletes before it writes, so that it works in a full store: see CLAIM.
DELETE = (
    _FOREIGN
    + """
if strange then return 0 end
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('SET', KEYS[5], ARGV[1] .. '\\n' .. ARGV[2])
return 1
"""
)

# KEYS: a partition's mark. ARGV: the most bytes of a mark. Returns false where there is none; '' where the key is
# something else.
MARK = """
local length = redis.pcall('STRLEN', KEYS[1])
if type(length) == 'table' or length > tonumber(ARGV[1]) then return '' end
return redis.call('GET', KEYS[1])
"""

# KEYS: a partition's mark. ARGV: offset, the mark as its writer has last seen it or '', the most bytes of a mark. One
# that has moved on since stays: another worker has the partition by now, or had it.
NOTE = """
local length = redis.pcall('STRLEN', KEYS[1])
if type(length) == 'number' and length <= tonumber(ARGV[3]) then
  local found = redis.call('GET', KEYS[1]) or ''
  local theirs = found ~= ARGV[2] and string.match(found, '^%d+$')
  if theirs and tonumber(theirs) > tonumber(ARGV[1]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""

# KEYS: a note. ARGV: what to write where there is none, or ''; the most bytes of a note. Returns the note; '' where
# there is none, or the key is something else.
NOTE_ONCE = """
local length = redis.pcall('STRLEN', KEYS[1])
if type(length) == 'table' or length > tonumber(ARGV[2]) then return '' end
if length == 0 and ARGV[1] ~= '' then redis.call('SET', KEYS[1], ARGV[1]) end
return redis.call('GET', KEYS[1]) or ''
"""

# Returns header and last events of a stream; nothing where the key is something else.
END = (
    _WITHIN
    + """
if redis.call('TYPE', KEYS[1])['ok'] ~= 'hash' then return {false, false} end
return {field('header'), field('event')}
"""
)

# KEYS: what a deleted stream has left. Returns it; nothing where the key is something else.
LAST = (
    _WITHIN
    + """
if redis.call('TYPE', KEYS[1])['ok'] ~= 'string' then return false end
return within(KEYS[1], most_of['event'])
"""
)

# ARGV: cursor, pattern, how many keys to look at, the longest name that is returned.
NAMES = """
local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
local names = {}
for _, name in ipairs(found[2]) do
  if #name <= tonumber(ARGV[4]) then names[#names + 1] = name end
end
return {found[1], names}
"""
