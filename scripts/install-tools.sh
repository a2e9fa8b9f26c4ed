#!/usr/bin/env bash
# What the tests start that isn't a Python package: a Redis server, Prometheus' promtool, and a browser with a Chinese font.
# Does nothing where they are.
set -euo pipefail

fail() { echo "install-tools: $*" >&2; exit 1; }

# Debian's package of each command.
packages=()
command -v redis-server >/dev/null || packages+=(redis-server)
command -v promtool >/dev/null || packages+=(prometheus)
command -v chromium >/dev/null || packages+=(fonts-wqy-microhei chromium)
[ ${#packages[@]} = 0 ] && exit 0

command -v apt-get >/dev/null || fail "needs ${packages[*]} and found no apt-get to install it with; put redis-server, promtool and chromium on PATH"
[ "$(id -u)" = 0 ] || fail "needs ${packages[*]}, which only root may install: sudo apt-get install ${packages[*]}"
log=$(mktemp)
# RUNLEVEL=1: the packages start no servers of their own.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 LC_ALL=C
failed() {
  tail -n 5 "$log" >&2
  fail "apt-get could not install ${packages[*]}; see $log"
}
apt-get update >"$log" 2>&1 </dev/null || failed
# Ubuntu has its chromium as a snap only.
without_chromium=
if [ "${packages[-1]}" = chromium ] && ! grep -q 'Candidate: [^(]' <<<"$(apt-cache policy chromium)"; then
  without_chromium=yes
  unset 'packages[-1]'
fi
apt-get install -y --no-install-recommends "${packages[@]}" >>"$log" 2>&1 </dev/null || failed
rm -f "$log"
[ -z "$without_chromium" ] || fail "apt-get has no chromium here (Ubuntu's is a snap); the rest is installed: put a chromium on PATH, for tests/ui"
