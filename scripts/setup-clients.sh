#!/usr/bin/env bash
# Makes .venv-clients: the clients of docs/clients.md, which the tests call the gateway with. They want other
# versions of what the gateway uses, and drag in much that it doesn't need.
# Does nothing when it is there already and what it was made from has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-clients
python=${1:-.venv/bin/python}
# langchain-cohere holds the SDK below version 6; the newest lies beside it.
newest=cohere==7.3.1

wanted=$(cat constraints/clients.txt scripts/setup-clients.sh | sha256sum | cut -c1-16)
[ "$(cat "$venv/.made" 2>/dev/null)" = "$wanted" ] && exit 0

echo "setup: installing the clients into $venv (0.5 GB, under a minute; the log is $venv/install.log)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() {
  "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-compile "$@" >>"$venv/install.log" 2>&1 || {
    tail -n 5 "$venv/install.log" >&2
    echo "setup: the clients could not be installed; see $venv/install.log" >&2
    exit 1
  }
}
: >"$venv/install.log"
# The list is complete, so pip needs to resolve nothing.
install -r constraints/clients.txt
rm -rf "$venv/newest"
install --target "$venv/newest" "$newest"
echo "$wanted" >"$venv/.made"
