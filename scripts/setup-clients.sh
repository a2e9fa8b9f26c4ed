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

wanted=$(cat constraints/clients.txt scripts/setup-clients.sh scripts/packages.sh | sha256sum | cut -c1-16)
[ "$(cat "$venv/.made" 2>/dev/null)" = "$wanted" ] && exit 0

echo "setup: installing the clients into $venv (0.5 GB, half a minute; the log is $venv/install.log)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
. scripts/packages.sh
install_exactly() {
  install --no-deps "$@" || {
    tail -n 5 "$venv/install.log" >&2
    echo "setup: the clients could not be installed; see $venv/install.log" >&2
    exit 1
  }
}
# The list is complete, so there is nothing to resolve.
install_exactly -r constraints/clients.txt
rm -rf "$venv/newest"
install_exactly --target "$venv/newest" "$newest"
rm -rf "$venv/.uv-cache"
echo "$wanted" >"$venv/.made"
