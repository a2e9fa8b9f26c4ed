# Installs packages into $venv; sourced by the scripts that make environments. The log is $venv/install.log.

# install ARGUMENT…: what `pip install ARGUMENT…` does, by uv, which takes a fifth of pip's time, and where uv can't by pip.
install() { install_with uv "$@" || install_with pip "$@"; }

# Nothing is compiled: the callers do that on all cores, or never.
install_with() {
  case $1 in
    uv) [ -x "$venv/bin/uv" ] && "$venv/bin/uv" pip install --python "$venv/bin/python" "${@:2}" ;;
    pip) "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile "${@:2}" ;;
  esac >>"$venv/install.log" 2>&1
}

# set_uv VARIABLE OPTION [SEPARATOR]: uv's variable, unless it is set, from pip's option. What pip lists are the words of a line.
set_uv() {
  local scope found
  [ -z "${!1:-}" ] || return 0
  for scope in :env: install global; do
    found=$(sed -n "s/^$scope\.$2='\(.*\)'$/\1/p" <<<"$pip_settings")
    [ -z "$found" ] || break
  done
  found=$(sed 's/\\n/ /g; s/^ *//; s/ *$//; s/  */ /g' <<<"$found")
  [ -z "$found" ] || export "$1=${found// /${3:- }}"
}

: >"$venv/install.log"
install_with pip uv==0.13.9 || true
# Who has set pip up for a mirror, its certificate or a slow line has nothing more to do.
pip_settings=$("$venv/bin/python" -m pip config list)
set_uv UV_DEFAULT_INDEX index-url
set_uv UV_INDEX extra-index-url
set_uv UV_FIND_LINKS find-links ,
set_uv UV_INSECURE_HOST trusted-host
set_uv UV_HTTP_TIMEOUT default-timeout
set_uv SSL_CERT_FILE cert
# Of all indexes the newest version, as pip.
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
# On the environment's own disk, where what is installed from it takes no second place.
export UV_CACHE_DIR=${UV_CACHE_DIR:-$(cd "$venv" && pwd)/.uv-cache}
