#!/usr/bin/env bash
# What the tests start that isn't a Python package: a Redis server, Prometheus' promtool, and a browser with a Chinese font.
# Does nothing where they are.
set -euo pipefail

fail() { echo "install-tools: $*" >&2; exit 1; }

# Debian's package of each command.
packages=()
command -v redis-server >/dev/null || packages+=(redis-server)
command -v promtool >/dev/null || packages+=(prometheus)
command -v chromium >/dev/null || packages+=(chromium fonts-wqy-microhei)
[ ${#packages[@]} = 0 ] && exit 0

command -v apt-get >/dev/null || fail "needs ${packages[*]} and found no apt-get to install it with; put redis-server, promtool and chromium on PATH"
[ "$(id -u)" = 0 ] || fail "needs ${packages[*]}, which only root may install: sudo apt-get install ${packages[*]}"
log=$(mktemp)
# RUNLEVEL=1: the packages start no servers of their own.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
if ! { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1 </dev/null; then
  tail -n 5 "$log" >&2
  fail "apt-get could not install ${packages[*]}; see $log"
fi
rm -f "$log"
