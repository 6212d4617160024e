#!/bin/sh
# Makes what the foreign clients need, in ${WHARF_CACHE:-~/.cache/wharf}/clients: a Python environment with the
# versions of requirements.txt, and code generated from proto/. Prints the path of its Python.
# Done once; the second time it only compares. Nothing is written into the source tree.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
proto=$(cd "$here/../../proto" && pwd)
cache=${WHARF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wharf}/clients
mkdir -p "$cache"

# One at a time: tests of several checkouts share the cache.
exec 9>"$cache/lock"
if command -v flock >/dev/null 2>&1; then flock -w 600 9; fi

command -v python3 >/dev/null 2>&1 || { echo "python3 is not installed; the foreign clients need it" >&2; exit 1; }

sum() { cat "$@" | cksum | tr -d ' \n'; }
made=$(python3 --version)-$(sum "$here/requirements.txt")
if [ "$(cat "$cache/venv/made" 2>/dev/null || true)" != "$made" ]; then
    rm -rf "$cache/venv"
    python3 -m venv "$cache/venv" >&2 || { echo "python3 has no venv; install python3-venv" >&2; exit 1; }
    "$cache/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
    echo "$made" >"$cache/venv/made"
fi

# A directory for each state of the protos, so that two checkouts don't take each other's code.
code=$cache/code-$(sum "$proto/scheduler.proto" "$proto/inference.proto" "$proto/health.proto" "$here/requirements.txt")
if [ ! -e "$code/made" ]; then
    rm -rf "$code"
    mkdir -p "$code"
    "$cache/venv/bin/python" -m grpc_tools.protoc -I "$proto" --python_out="$code" --grpc_python_out="$code" \
        scheduler.proto inference.proto health.proto >&2
    touch "$code/made"
fi
echo "$cache/venv/bin/python"
echo "$code"
