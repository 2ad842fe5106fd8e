#!/usr/bin/env bash
# A real Ray cluster on one machine: a head and N nodes, each a raylet of its own with its own resources, object store
# and folder. For trying out what a cluster does, a node's death among it, and for the tests.
#
#   cluster/local.sh up 3          a head, which runs drivers alone, and three nodes of 2 CPUs
#   cluster/local.sh status        nodes, and what to give to `--address`
#   cluster/local.sh add           one node more; prints its name
#   cluster/local.sh kill node2    ends a node as a power cut would
#   cluster/local.sh down          ends what `up` and `add` started, and nothing else
#   eval "$(cluster/local.sh env)" so that metatrain and ray in this shell speak to it
#
# Settings, by environment:
#   CLUSTER    folder of the cluster's state   (/tmp/metatrain-cluster-UID; short, since sockets lie in it)
#   CPUS       CPUs that each node says it has (2)
#   STORE_MB   object store of each node, MiB  (150)
#   RAY        the ray command                 (that of .venv beside this folder, else the PATH's)
#
# All ports are free ones. Every request must carry the cluster's token, but those for metrics: Ray's nodes listen on the
# machine's own address, whatever they are told.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CLUSTER=${CLUSTER:-/tmp/metatrain-cluster-$(id -u)}
CPUS=${CPUS:-2}
STORE_MB=${STORE_MB:-150}
if [ -z "${RAY:-}" ]; then
    RAY=$([ -x "$HERE/.venv/bin/ray" ] && echo "$HERE/.venv/bin/ray" || echo ray)
fi
PYTHON=$(dirname "$(command -v "$RAY")")/python

fail() {
    echo "cluster/local.sh: $*" >&2
    exit 1
}

# A process is known by its id and its start, since ids come again. A zombie has none.
started() { awk '{ sub(/.*\) /, ""); if ($1 != "Z") print $20 }' "/proc/$1/stat" 2>/dev/null || true; }

alive() { # NAME: whether that node runs
    local pid start
    read -r pid start 2>/dev/null <"$CLUSTER/$1/pid" || return 1
    [ -n "$start" ] && [ "$(started "$pid")" = "$start" ]
}

family() { # PID: the session that it leads, and all below it
    ps -e -o pid=,ppid=,sid= | awk -v root="$1" '
        { parent[$1] = $2; session[$1] = $3 }
        END {
            for (pid in parent) {
                for (p = pid; p in parent && session[p] != root && p > 1; p = parent[p]);
                if (session[p] == root) print pid
            }
        }'
}

use_token() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$CLUSTER/token"
    # What the shell says of another cluster must not lead there.
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN
    # A job's command is `python …`: that of the same environment.
    PATH="$(dirname "$(command -v "$RAY")"):$PATH"
}

start_node() { # NAME ARGUMENT…: starts a raylet that stays when this script ends
    local folder="$CLUSTER/$1" pid
    shift
    mkdir -p "$folder"
    setsid "$RAY" start --block --disable-usage-stats --node-ip-address=127.0.0.1 --temp-dir="$folder/ray" \
        --object-store-memory=$((STORE_MB * 1024 * 1024)) --min-worker-port=0 --max-worker-port=0 \
        --object-manager-port=0 --node-manager-port=0 --dashboard-agent-listen-port=0 --metrics-export-port=0 \
        "$@" </dev/null >"$folder/log" 2>&1 &
    pid=$!
    echo "$pid $(started "$pid")" >"$folder/pid"
}

wait_for() { # NAME: until its raylet runs; 1 where it does not come to that, or the head has gone
    local name
    for _ in $(seq 600); do
        for name in head "$1"; do
            alive "$name" || { told "$name" "ended as it started"; return 1; }
        done
        grep -q "Ray runtime started" "$CLUSTER/$1/log" 2>/dev/null && return
        sleep 0.2
    done
    told "$1" "did not start within two minutes"
    return 1
}

told() { # NAME WHAT: the end of a node's log, and what is wrong with it
    tail -n 20 "$CLUSTER/$1/log" >&2
    echo "cluster/local.sh: $1 $2" >&2
}

# Ray gives a node and each of its services 30 seconds to start, which a busy machine may need more than.
was_slow() { grep -qi "timed out" "$CLUSTER"/*/log; }

free_ports() { "$PYTHON" - "$1" <<'PYTHON'
import socket, sys
open_ones = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in open_ones))
PYTHON
}

is_up() { [ -f "$CLUSTER/address" ] && alive head; }
need_up() { is_up || fail "no cluster is up in $CLUSTER: cluster/local.sh up 3"; }

add_node() { # prints the new node's name
    local number=1
    while [ -e "$CLUSTER/node$number" ]; do number=$((number + 1)); done
    start_node "node$number" --address="$(cat "$CLUSTER/address")" --num-cpus="$CPUS" --num-gpus=0 \
        --include-log-monitor=false --resources="{\"node$number\": 1}"
    echo "node$number"
}

end_node() { # NAME: at once, with all its processes
    local pid
    read -r pid _ 2>/dev/null <"$CLUSTER/$1/pid" || return 0
    if ! alive "$1"; then
        # What its first process has left behind. Not where the id is another's by now.
        [ -n "$(started "$pid")" ] || family "$pid" | xargs -r kill -KILL 2>/dev/null || true
        return 0
    fi
    family "$pid" | xargs -r kill -KILL 2>/dev/null || true
    # The children too, at once: what outlives its parent is another's, and not found again.
    while alive "$1"; do sleep 0.05; done
}

up() {
    local count=${1:-3} tries
    [[ $count =~ ^[1-9][0-9]*$ ]] || fail "up wants a number of nodes, not '$count'"
    is_up && fail "a cluster is up in $CLUSTER already: cluster/local.sh down, or another CLUSTER"
    for tries in 1 2 3; do
        if start "$count"; then
            status
            return
        fi
        was_slow || break
        echo "cluster/local.sh: Ray was too slow to start, try $tries of 3" >&2
        down
    done
    down
    fail "the cluster could not be started; above is the end of the log"
}

start() { # COUNT: a head and so many nodes; 1 where they do not come up
    local count=$1 gcs dashboard client number
    down
    mkdir -p "$CLUSTER"
    chmod 700 "$CLUSTER"
    "$PYTHON" -c 'import secrets; print(secrets.token_hex(32))' >"$CLUSTER/token"
    use_token
    read -r gcs dashboard client <<<"$(free_ports 3)"
    start_node head --head --port="$gcs" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --ray-client-server-port="$client" --num-cpus=0 --num-gpus=0 --include-log-monitor=false
    wait_for head || return 1
    echo "127.0.0.1:$gcs" >"$CLUSTER/address"
    echo "http://127.0.0.1:$dashboard" >"$CLUSTER/dashboard"
    for _ in $(seq "$count"); do add_node >/dev/null; done
    for number in $(seq "$count"); do wait_for "node$number" || return 1; done
}

status() {
    need_up
    for folder in "$CLUSTER"/head "$CLUSTER"/node*; do
        [ -d "$folder" ] || continue
        printf '%-8s %s\n' "$(basename "$folder")" "$(alive "$(basename "$folder")" && echo "up, process $(cut -d' ' -f1 "$folder/pid")" || echo down)"
    done
    echo
    env_lines
}

env_lines() {
    echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$CLUSTER/token"
    echo "export RAY_API_SERVER_ADDRESS=$(cat "$CLUSTER/dashboard")  # train takes --address $(cat "$CLUSTER/address")"
}

down() {
    local folder
    [ -d "$CLUSTER" ] || return 0
    for folder in "$CLUSTER"/node* "$CLUSTER"/head; do
        [ -d "$folder" ] && end_node "$(basename "$folder")"
    done
    rm -rf "$CLUSTER"
}

case "${1:-}" in
    up) up "${2:-3}" ;;
    add)
        need_up
        use_token
        name=$(add_node)
        wait_for "$name" || fail "the node could not be started; above is the end of its log"
        echo "$name"
        ;;
    kill)
        need_up
        [ -d "$CLUSTER/${2:?which node? cluster/local.sh status lists them}" ] || fail "there is no node $2"
        alive "$2" || fail "$2 is down already"
        end_node "$2"
        ;;
    status) status ;;
    env) need_up && env_lines ;;
    down) down ;;
    *)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '/^set /d' >&2
        exit 2
        ;;
esac
