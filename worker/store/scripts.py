"""What the store runs as one: Lua scripts for `worker.store.store`, which says what the keys are."""

from __future__ import annotations

from schemas.state import MAX_EVENTS_BYTES, MAX_HEADER_BYTES

MAX_OWNER_BYTES = 1_000

# The first key that no worker wrote, as {key, type}. The scripts below are given a stream's keys in this order.
# A token has at most 15 digits: more are no number that Lua can tell from the next, and in the end none to be raised.
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

# A string, or a field of the stream's hash; an empty one where it has more bytes than it may. Whoever reads it takes it
# for damaged.
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

# ARGV: owner; 'any', or 'known' where a new stream is not to begin, or 'last' where the stream is about to be deleted;
# how many bytes of tensors are read.
# A store that is full refuses a script whose first write may need memory, and only the first: so 'last' goes through.
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

# ARGV: how many bytes of tensors are read.
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

# KEYS: a stream's snapshots. ARGV: which, 0 the newest; how many bytes it may have. Returns how many there are, and
# that one: empty where it has more. Nothing where something else is there.
SNAPSHOT = """
local count = redis.pcall('LLEN', KEYS[1])
if type(count) == 'table' then return {} end
local content = redis.call('LINDEX', KEYS[1], ARGV[1]) or ''
if #content > tonumber(ARGV[2]) then content = '' end
return {count, content}
"""

# KEYS: a stream's snapshots. ARGV: how many may be. Returns what is said of each, as `worker.store.store` puts it
# before the tensors: empty where that is too much. Nothing where something else is there.
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

# ARGV: token, header, event, tensors or '', seconds to live or 0, snapshot or '', snapshots to keep, number,
# approved or '', '1' where those that are there have to stay, number of the write that these are of or ''. Returns 1
# where it is written, 0 where it is refused, 2 where what should stay is not there, or the store has lost that write.
# A number that is there already is this write come twice only where the header is there, too.
# Types are looked at where this would write only: the claim has seen all of them, and each look costs microseconds.
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

# ARGV: token, last event. What frees memory goes first: see CLAIM.
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

# KEYS: a partition's mark. ARGV: how many bytes it may have. False where there is none; empty where something else is
# there.
MARK = """
local length = redis.pcall('STRLEN', KEYS[1])
if type(length) == 'table' or length > tonumber(ARGV[1]) then return '' end
return redis.call('GET', KEYS[1])
"""

# KEYS: a partition's mark. ARGV: offset, the mark as its writer last saw it or '', how many bytes a mark may have. One
# that has gone on since is left: its partition is another worker's by now, or was.
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

# KEYS: what a topic's positions are of. ARGV: what to note where nothing is, or ''; how many bytes it may have. Empty
# where nothing is noted, or something else is there.
NOTE_ONCE = """
local length = redis.pcall('STRLEN', KEYS[1])
if type(length) == 'table' or length > tonumber(ARGV[2]) then return '' end
if length == 0 and ARGV[1] ~= '' then redis.call('SET', KEYS[1], ARGV[1]) end
return redis.call('GET', KEYS[1]) or ''
"""

# Nothing where something else is there.
END = (
    _WITHIN
    + """
if redis.call('TYPE', KEYS[1])['ok'] ~= 'hash' then return {false, false} end
return {field('header'), field('event')}
"""
)

# KEYS: what a stream left that was deleted. Nothing where something else is there.
LAST = (
    _WITHIN
    + """
if redis.call('TYPE', KEYS[1])['ok'] ~= 'string' then return false end
return within(KEYS[1], most_of['event'])
"""
)

# ARGV: cursor, pattern, how many keys are looked at, how long a name may be; longer ones are left out.
NAMES = """
local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
local names = {}
for _, name in ipairs(found[2]) do
  if #name <= tonumber(ARGV[4]) then names[#names + 1] = name end
end
return {found[1], names}
"""
