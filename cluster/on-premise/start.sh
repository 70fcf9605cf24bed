#!/usr/bin/env bash
# Starts Ray on a machine of your own, closed to whoever lacks the cluster's token:
#
#   start.sh head [OPTION...]
#   start.sh worker HEAD_IP:PORT ROLE[,ROLE...] [OPTION...]
#
# A role is what `resources.actors_on` and its like ask for: sampling, training, scoring, serving, or your own.
# OPTIONs go to `ray start` and override what is set here.
#
#   FIRST_PORT (6379)           of eight in a row
#   DASHBOARD_PORT (8265), DASHBOARD_HOST (127.0.0.1)
#   RAY_AUTH_TOKEN_PATH (~/.ray/auth_token)   the token; `start.sh head` makes one if there is none
#   RAY (ray)                   the command
set -euo pipefail

fail() {
  echo "start.sh: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

first=${FIRST_PORT:-6379}
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

# Jobs are run by the `python` that Ray finds here.
beside=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin
if [[ -x $beside/ray ]]; then PATH=$beside:$PATH; fi

make_token() (
  umask 077
  mkdir -p "$(dirname "$token")"
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$token"
)

# Fixed, so that a firewall can name them; those of the workers are 10002 to 19999.
options=(
  "--node-manager-port=$((first + 1))"
  "--object-manager-port=$((first + 2))"
  "--runtime-env-agent-port=$((first + 3))"
  "--dashboard-agent-grpc-port=$((first + 4))"
  "--dashboard-agent-listen-port=$((first + 5))"
  "--metrics-export-port=$((first + 6))"
)

case ${1:-} in
  head)
    shift
    options+=(
      --head "--port=$first" "--ray-client-server-port=$((first + 7))" --disable-usage-stats
      "--dashboard-host=${DASHBOARD_HOST:-127.0.0.1}"  # it can run code
      "--dashboard-port=${DASHBOARD_PORT:-8265}"
    )
    if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s $token ]]; then make_token; fi
    ;;
  worker)
    [[ $# -ge 3 ]] || usage
    [[ $2 =~ ^[^:]+:[0-9]+$ ]] || fail "'$2' is not HEAD_IP:PORT"
    name='[A-Za-z0-9][A-Za-z0-9._-]*'
    [[ $3 =~ ^$name(,$name)*$ ]] || fail "'$3' is not a role, or several with commas between"
    options+=("--address=$2" "--resources={\"${3//,/\": 1, \"}\": 1}")
    shift 3
    if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s $token ]]; then
      fail "no token in $token: copy the head's there, with mode 600"
    fi
    ;;
  *) usage ;;
esac

# A deployment's code and its handles share an event loop, as `vas serve` has it
export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
  if [[ -O $token ]]; then chmod 600 "$token"; fi
  export RAY_AUTH_TOKEN_PATH=$token
fi
ulimit -Sn 65536 2> /dev/null || true  # each worker takes many; what is allowed must do
exec "${RAY:-ray}" start "${options[@]}" "$@"
