#!/usr/bin/env bash
# The Redis server that the tests start for themselves. Does nothing where there is one.
set -euo pipefail
command -v redis-server >/dev/null && exit 0

fail() { echo "install-redis: $*" >&2; exit 1; }

command -v apt-get >/dev/null || fail "found no redis-server and no apt-get to install it with; put redis-server on PATH"
[ "$(id -u)" = 0 ] || fail "found no redis-server, and only root may install it: sudo apt-get install redis-server"
log=$(mktemp)
# RUNLEVEL=1: the package starts no server of its own.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
if ! { apt-get update && apt-get install -y --no-install-recommends redis-server; } >"$log" 2>&1 </dev/null; then
  tail -n 5 "$log" >&2
  fail "apt-get could not install redis-server; see $log"
fi
rm -f "$log"
