"""What `redis_store.py` has Redis do in one step, in Lua. Keys are named in the order in which they are passed."""

_COMMON = """
local function now() local t = redis.call('TIME') return t[1] .. '.' .. string.format('%06d', t[2]) end
local function settle(commands, outcomes, waiting, rollout, id, outcome)
  redis.call('HSET', outcomes, id, outcome)
  redis.call('ZREM', waiting, rollout .. ' ' .. id)
end
local function is_waiting(commands, outcomes, id)
  return redis.call('HEXISTS', commands, id) == 1 and redis.call('HEXISTS', outcomes, id) == 0
end
-- Drops what is older than a time, a thousand a call, and all but the newest `most`.
local function prune(order, data, before, most)
  local old = redis.call('ZRANGEBYSCORE', order, '-inf', '(' .. before, 'LIMIT', 0, 1000)
  if #old > 0 then
    redis.call('ZREM', order, unpack(old))
    if data then redis.call('HDEL', data, unpack(old)) end
  end
  local more = redis.call('ZCARD', order) - most
  while more > 0 do
    old = redis.call('ZRANGE', order, 0, math.min(more, 1000) - 1)
    redis.call('ZREM', order, unpack(old))
    if data then redis.call('HDEL', data, unpack(old)) end
    more = more - #old
  end
end
"""
_SCRIPTS = {
    "acquire": """
local held = redis.call('GET', KEYS[1])
if held and string.match(held, '^%d+ (.*)$') ~= ARGV[1] then return false end
local token = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[1], 'PX', ARGV[2])
return token
""",
    "renew": """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""",
    "release": """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
""",
    "create": """
local rollout, history, active, all, of_route, seqs = unpack(KEYS)
local id, route, spec, state, finished, entry = unpack(ARGV)
local there = redis.call('HMGET', rollout, 'route', 'spec')
if there[1] then
  if there[1] ~= route or there[2] ~= spec then return {'taken', ''} end
  return {'ok', redis.call('HGETALL', rollout)}
end
if finished == '0' then
  local other = redis.call('HGET', active, route)
  if other then return {'busy', other} end
  redis.call('HSET', active, route, id)
end
local at, seq = now(), redis.call('INCR', seqs)
redis.call('HSET', rollout, 'id', id, 'route', route, 'spec', spec, 'state', state, 'finished', finished,
  'version', 1, 'created_at', at, 'updated_at', at)
redis.call('RPUSH', history, '1 ' .. at .. ' ' .. entry)
redis.call('ZADD', all, seq, id)
redis.call('ZADD', of_route, seq, id)
return {'ok', redis.call('HGETALL', rollout)}
""",
    "commit": """
local lease, rollout, history, commands, outcomes, waiting, active = unpack(KEYS)
local held, id, version, state, finished, entry, command = unpack(ARGV)
if redis.call('GET', lease) ~= held then return {'stale', ''} end
local there = redis.call('HMGET', rollout, 'version', 'route')
if not there[1] then return {'unknown', ''} end
if there[1] ~= version then return {'moved', there[1]} end
if command ~= '' and not is_waiting(commands, outcomes, command) then return {'settled', ''} end
local other = redis.call('HGET', active, there[2])
if finished == '0' then
  if other and other ~= id then return {'busy', other} end
  redis.call('HSET', active, there[2], id)
elseif other == id then
  redis.call('HDEL', active, there[2])
end
if command ~= '' then settle(commands, outcomes, waiting, id, command, 'applied') end
local at = now()
version = redis.call('HINCRBY', rollout, 'version', 1)
redis.call('HSET', rollout, 'state', state, 'finished', finished, 'updated_at', at)
if entry ~= '' then redis.call('RPUSH', history, version .. ' ' .. at .. ' ' .. entry) end
return {'ok', redis.call('HGETALL', rollout)}
""",
    "add_command": """
local rollout, commands, waiting, seqs = unpack(KEYS)
local id, command, document, most = unpack(ARGV)
if redis.call('EXISTS', rollout) == 0 then return 'unknown' end
local there = redis.call('HGET', commands, command)
if there then
  return string.match(there, '^%S+ %S+ (.*)$') == document and 'ok' or 'taken'
end
if redis.call('ZCARD', waiting) >= tonumber(most) then return 'full' end
local seq = redis.call('INCR', seqs)
redis.call('HSET', commands, command, seq .. ' ' .. now() .. ' ' .. document)
redis.call('ZADD', waiting, seq, id .. ' ' .. command)
return 'ok'
""",
    "refuse": """
local lease, commands, outcomes, waiting = unpack(KEYS)
local held, id, command, outcome = unpack(ARGV)
if redis.call('GET', lease) ~= held then return 'stale' end
if not is_waiting(commands, outcomes, command) then return 'settled' end
settle(commands, outcomes, waiting, id, command, outcome)
return 'ok'
""",
    "add_figures": """
local rollout, buckets, figures = unpack(KEYS)
local ttl, most = tonumber(ARGV[1]), tonumber(ARGV[2])
if redis.call('EXISTS', rollout) == 0 then return 0 end
local oldest = tonumber(now()) - ttl
local added = 0
for i = 3, #ARGV, 3 do
  if tonumber(ARGV[i + 1]) >= oldest then
    added = added + redis.call('HSETNX', figures, ARGV[i], ARGV[i + 2])
    redis.call('ZADD', buckets, ARGV[i + 1], ARGV[i])
  end
end
prune(buckets, figures, oldest, most)
for i = 2, 3 do redis.call('EXPIRE', KEYS[i], math.ceil(ttl)) end
return added
""",
    "add_searches": """
local searches, times = unpack(KEYS)
local at = tonumber(now())
for i = 3, #ARGV, 3 do
  local asked = math.min(at, tonumber(ARGV[i + 1]))
  if redis.call('ZADD', times, 'NX', asked, ARGV[i]) == 1 then
    -- rollout and role, minute, shown, clicked, topmost click
    local served = cjson.decode(ARGV[i + 2])
    redis.call('HSET', searches, ARGV[i], cjson.encode({served[1], served[2], math.floor(asked / 60), 0, 0, 0}))
  end
end
prune(times, searches, at - tonumber(ARGV[1]), tonumber(ARGV[2]))
""",
    "add_events": """
local searches, times, ids, counts = unpack(KEYS)
local ttl, most_ids, counts_ttl, ranks = unpack(ARGV)
ranks = tonumber(ranks)
local at = tonumber(now())
prune(times, searches, at - ttl, math.huge)
local counted, repeated, unknown = 0, 0, 0
for i = 5, #ARGV, 4 do
  local query, kind, position = ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local found = redis.call('HGET', searches, query)
  if not found then
    unknown = unknown + 1
  -- A microsecond apart, so that the oldest goes first.
  elseif redis.call('ZADD', ids, 'NX', at + i / 4e6, ARGV[i]) == 0 then
    repeated = repeated + 1
  else
    counted = counted + 1
    local rollout, role, minute, shown, clicked, top = unpack(cjson.decode(found))
    local day = counts .. rollout .. ':' .. math.floor(minute / 1440)
    local function count(figure, n) redis.call('HINCRBY', day, minute .. ' ' .. figure .. ' ' .. role, n) end
    if shown == 0 then count('impressions', 1) end
    if kind == 'click' then
      count('clicks', 1)
      if clicked == 0 then count('clicked', 1) end
      clicked = 1
      if position >= 1 and position <= ranks and (top == 0 or position < top) then
        count(position, 1)
        if top > 0 then count(top, -1) end
        top = position
      end
    end
    redis.call('HSET', searches, query, cjson.encode({rollout, role, minute, 1, clicked, top}))
    redis.call('EXPIRE', day, math.ceil(counts_ttl) + 86400)
  end
end
prune(ids, nil, at - ttl, tonumber(most_ids))
return {counted, repeated, unknown}
""",
}
SCRIPTS = {name: _COMMON + script for name, script in _SCRIPTS.items()}
