#!/bin/sh
# Installs the library of ONNX Runtime that tests run models with, in ${WHARF_CACHE:-~/.cache/wharf}/servers/onnxruntime, and
# prints `onnxruntime=PATH`. It is taken out of the wheel, without the rest of it. Nothing is written into the source tree.
set -eu
version=1.31.1
dir=${WHARF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wharf}/servers/onnxruntime
library=$dir/libonnxruntime.so
mkdir -p "$dir"

# One at a time: tests of several checkouts share the cache.
exec 9>"$dir/lock"
if command -v flock >/dev/null 2>&1; then flock -w 600 9; fi

if [ "$(cat "$dir/made" 2>/dev/null || true)" != "$version" ] || [ ! -f "$library" ]; then
    command -v python3 >/dev/null 2>&1 || { echo "python3 is not installed; ONNX Runtime comes from its registry" >&2; exit 1; }
    rm -rf "$dir/wheel"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$dir/wheel" \
        "onnxruntime==$version" >&2
    python3 -m zipfile -e "$dir"/wheel/onnxruntime-*.whl "$dir/wheel"
    mv "$dir/wheel/onnxruntime/capi/libonnxruntime.so.$version" "$library"
    rm -rf "$dir/wheel"
    echo "$version" >"$dir/made"
fi
echo "onnxruntime=$library"
