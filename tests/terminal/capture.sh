#!/bin/bash
# What a person sees in a terminal: starts `wharf up` on free ports in a folder of its own, types commands in a
# real terminal (tmux), and prints every screen as Markdown.
#
#   tests/terminal/capture.sh [WHARF] > docs/terminal.md
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
wharf=$(realpath "${1:-${CARGO_TARGET_DIR:-$root/target}/debug/wharf}")
command -v tmux >/dev/null || { echo "tmux is not installed: apt-get install tmux" >&2; exit 1; }
[ -x "$wharf" ] || { echo "there is no $wharf: run cargo build, or name it" >&2; exit 1; }

work=$(mktemp -d /tmp/wharf.XXXX)
# The screens show this name instead, which is as long.
shown=/srv/wharf-data
up=
cleanup() {
    tmux -L "${work##*/}" kill-server 2>/dev/null || true
    [ -z "$up" ] || kill "$up" 2>/dev/null || true
    [ -z "$up" ] || wait "$up" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

ln -s "$root/tests/models" "$work/models"
cat >"$work/servers.toml" <<'EOF'
[[server]]
name = "onnx"
runtime = "builtin"
replicas = 2
memory = "4Mi"
overcommit_percent = 50
EOF

# One manifest: file, name, storageUri, requirement, memory, replicas.
manifest() {
    cat >"$work/$1" <<EOF
apiVersion: mlops.seldon.io/v1alpha1
kind: Model
metadata:
  name: $2
spec:
  storageUri: $3
  requirements: [$4]
  memory: $5
  replicas: $6
EOF
}
manifest iris.yaml iris "$work/models/iris-1" onnx 1Mi 2
manifest iris-2.yaml iris "$work/models/iris-2" onnx 1Mi 2
manifest mlp.yaml mlp "$work/models/mlp" onnx 3Mi 1
manifest add.yaml add "$work/models/add" onnx 3Mi 1
manifest nowhere.yaml nowhere "$work/models/nowhere" onnx 1Mi 1
manifest broken.yaml broken "$work/models/broken" onnx 1Mi 1
manifest gpu.yaml segmenter "$work/models/mlp" cuda 1Mi 1
manifest huge.yaml huge "$work/models/mlp" onnx 64Gi 1

for _ in 1 2 3 4 5; do
    ports=()
    for i in 0 1 2 3; do ports+=($((15000 + (RANDOM % 3750) * 4 + i))); done
    (cd "$work" && exec env -u WHARF_CONFIG "$wharf" up --set "scheduler.listen=127.0.0.1:${ports[0]}" \
        --set "scheduler.agents=127.0.0.1:${ports[1]}" --set "scheduler.http=127.0.0.1:${ports[2]}" \
        --set "gateway.listen=127.0.0.1:${ports[3]}" --set "scheduler.servers=$work/servers.toml" \
        --set "scheduler.data_dir=$work/scheduler" --set "agent.data_dir=$work/agent") >"$work/log" 2>&1 &
    up=$!
    for _ in $(seq 200); do
        if grep -q '^ready' "$work/log" || ! kill -0 "$up" 2>/dev/null; then break; fi
        sleep 0.05
    done
    if grep -q '^ready' "$work/log"; then break; fi
    wait "$up" 2>/dev/null || true
    up=
done
[ -n "$up" ] || { cat "$work/log" >&2; exit 1; }
export WHARF_SCHEDULER_HOST=127.0.0.1:${ports[0]} WHARF_INFERENCE_HOST=127.0.0.1:${ports[3]} NO_COLOR=1

# One session stays, so that tmux does not end between two screens.
tmux -L "${work##*/}" -f /dev/null new-session -d -s stays 'exec sleep 600' \; set-option -g remain-on-exit on

# The screen without what tmux says itself, and without the empty lines at its end.
screen() {
    tmux -L "${work##*/}" capture-pane -p -S - -t s | sed -e "s#$work#$shown#g" -e 's/[[:space:]]*$//' |
        awk '/^Pane is dead/ { next } /./ { for (; empty; empty--) print ""; print; next } { empty++ }'
}

# Types a command in a terminal of $1 columns and $2 rows, and prints what is there once it has ended or, with a
# fourth argument, once that is on the screen.
type_in() {
    local size="$1 x $2" command=$3 until=${4:-}
    tmux -L "${work##*/}" new-session -d -s s -x "$1" -y "$2" -c "$work" "PATH='$(dirname "$wharf"):$PATH' $command"
    for _ in $(seq 600); do
        if [ -n "$until" ]; then
            if screen | grep -q -- "$until"; then break; fi
        elif [ "$(tmux -L "${work##*/}" display-message -p -t s '#{pane_dead}')" = 1 ]; then
            break
        fi
        sleep 0.05
    done
    printf '\n`%s` (%s)\n\n```text\n' "$command" "$size"
    screen
    printf '```\n'
    tmux -L "${work##*/}" kill-session -t s
}
say() { printf '\n%s\n' "$*"; }
quietly() { (cd "$work" && "$wharf" "$@") >/dev/null 2>&1 || true; }

cat <<'EOF'
# What Wharf looks like in a terminal

Screens of a real terminal, made by `tests/terminal/capture.sh`; columns and rows in brackets. Colours are left out.
EOF
say '## Loading'
type_in 80 24 'wharf model load -f iris.yaml -w'
type_in 80 24 'wharf model load -f mlp.yaml -w'
type_in 80 24 'wharf model status iris'
say 'A new version:'
type_in 80 24 'wharf model load -f iris-2.yaml -w'
say '## Looking'
quietly load -f "$work/add.yaml" -w
# The old version leaves once no gateway can know it any more, and agents tell what is in memory with a heartbeat.
for _ in $(seq 300); do
    if "$wharf" server status onnx -o table 2>/dev/null | awk '$2 == "Available" { n += $3; m += $4 } END { exit !(n == 4 && m == 4) }'; then break; fi
    sleep 0.1
done
type_in 80 24 'wharf server list'
type_in 80 24 'wharf server status onnx'
type_in 120 40 'wharf server status onnx'
type_in 80 24 'wharf model list --watch' 'mlp '
say '## When it can not be done'
say 'There is nothing at the path:'
type_in 80 24 'wharf model load -f nowhere.yaml -w'
say 'What is there is no ONNX model:'
type_in 80 24 'wharf model load -f broken.yaml -w'
say 'No server has the capability:'
type_in 80 24 'wharf model load -f gpu.yaml -w -t 2'
type_in 80 24 'wharf explain segmenter'
say 'No server has the memory:'
type_in 80 24 'wharf model load -f huge.yaml -w -t 2'
type_in 120 40 'wharf explain huge'
say 'All of them at a glance:'
type_in 80 24 'wharf model list'
type_in 120 40 'wharf model list'
type_in 80 24 'wharf model status huge'
say 'Nobody is there:'
type_in 80 24 'wharf model list --scheduler-host 127.0.0.1:9'
say '## The demo'
type_in 80 24 'wharf demo --models models'
