#!/usr/bin/env bash
# launch/worker.sh ACTION: what a launcher has done on each host; for hands only when something is amiss.
#
#   setup [--run=ID]       a virtual environment with the pinned requirements (../constraints.txt)
#   start [--run=ID] ARGUMENTS   main.py in the background: ~/.longctx/{log,pid,status}
#   follow [LINES]         prints the log, from its start or its last LINES, until the run ends; its status
#   state                  HOST running | exited STATUS | stopped (before it could save) | killed | none
#   stop                   SIGTERM, so that the run saves and leaves; SIGKILL after 120 seconds
#   end                    the same, by a launcher that may start it again
#   exec ARGUMENTS         main.py in the foreground
#
# ID is the launcher's: what `stop` ended, or found between two starts, is not started again for the same ID.
# ARGUMENTS are main.py's, with --workdir of a folder or bucket, --platform=tpu or gpu before them, and
# --seen=ID, which WORKDIR/.seen must hold where all hosts share it.

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

# prepare ARGUMENTS...: COMMAND, with its environment and the workdir as this host sees it.
prepare() {
  local argument platform=tpu seen='' found='' workdir='' rest=()
  for argument in "$@"; do
    case $argument in
      --platform=*) platform=${argument#*=} ;;
      --seen=*) seen=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
      *) rest+=("$argument") ;;
    esac
  done
  mount_workdir "$workdir"
  if [[ -n $seen ]]; then
    read -r found 2>/dev/null <"$WORKDIR_HERE/.seen" || true
    [[ $found == "$seen" ]] ||
      die "--workdir=$workdir: $(hostname) does not see it as the launching host does; give a folder of a" \
        "file system that all hosts share, or gs://BUCKET/FOLDER"
  fi
  flags_of "$platform"
  COMMAND=(env "${ENVIRONMENT[@]}" "JAX_PLATFORMS=${JAX_PLATFORMS_OF[$platform]}"
    "$PYTHON" -m longctx.main "${rest[@]}" "--workdir=$WORKDIR_HERE")
}

# take RUN: what was said to the launchers before it is not said to this one.
take() {
  if [[ -n $1 && -e $STATE/run && $(<"$STATE/run") == "$1" ]]; then return; fi
  mkdir -p "$STATE"
  rm -f "$STATE/stopping"
  echo "$1" >"$STATE/run" || no_room
}

no_room() { die "$STATE: cannot be written to on $(hostname); see that its disk is not full (df $STATE)"; }

setup() {
  local run=${1:-}
  take "${run#--run=}"
  command -v gcsfuse >/dev/null || install_gcsfuse
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv
  # The image's Python may be older than longctx needs.
  [[ -x .venv/bin/python ]] || uv venv --quiet --python "$(cat python_version)" .venv
  uv pip install --quiet --python .venv/bin/python --requirement requirements.txt 'jax[tpu]' gcsfs \
    --constraint constraints.txt
}

# As cloud.google.com/storage/docs/cloud-storage-fuse/install has it.
install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc source=https://packages.cloud.google.com/apt
  sudo curl --silent --show-error --fail --output "$keys" "$source/doc/apt-key.gpg"
  echo "deb [signed-by=$keys] $source gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet=2
  sudo apt-get install --yes --quiet=2 gcsfuse
}

running() {
  [[ -s $STATE/pid && ! -s $STATE/status ]] && [[ $(ps -o stat= -p "$(cat "$STATE/pid")") =~ ^[^Z] ]]
}

start() {
  local run='' i
  if running; then die "$(hostname): a run is still going (pid $(cat "$STATE/pid")); stop it first"; fi
  if [[ ${1:-} == --run=* ]]; then
    run=${1#*=}
    shift
  fi
  mkdir -p "$STATE"
  rm -f "$STATE"/{status,pid,log}   # else an earlier run's are told, should this one not start
  trap 'echo "$?" >"$STATE/status"' EXIT
  take "$run"
  prepare "$@"
  # A session of its own, which outlives the connection, and outlives SIGTERM to tell the run's status,
  # which is there whole or not at all. 75, saved and not finished, is no failure where it was asked for.
  # `stop` leaves its mark before it looks for the pid, and here it is the other way round: none is missed.
  # shellcheck disable=SC2016
  nohup setsid bash -c 'trap : TERM; echo $$ >"$1/pid" || exit
    code=143; if [[ ! -e $1/stopping ]]; then code=0; "${@:2}" || code=$?; fi
    if [[ $code == 75 && -e $1/stopping ]]; then code=0; fi
    echo "$code" >"$1/status.new"; mv "$1/status.new" "$1/status"' - "$STATE" "${COMMAND[@]}" \
    >"$STATE/log" 2>&1 </dev/null 3>&- &
  for ((i = 0; i < 300; i++)); do
    if [[ -s $STATE/pid ]]; then
      trap - EXIT
      return
    fi
    sleep 0.1
  done
  kill -KILL "$!" 2>/dev/null || true
  no_room
}

follow() {
  local lines=${1:-+1}
  [[ -s $STATE/pid || -s $STATE/status ]] || die "$(hostname): no run was started here"
  if [[ -s $STATE/pid ]]; then tail -n "$lines" -f --pid="$(cat "$STATE/pid")" "$STATE/log"; fi
  return "$(ended)"
}

state() {
  local said=none
  if running; then
    said=running
  elif stopped; then
    said=stopped
  elif [[ -s $STATE/status ]]; then
    said="exited $(ended)"
  elif [[ -s $STATE/pid ]]; then
    said=killed
  fi
  echo "$(hostname) $said"
}

# stopped: by `stop`, before it could save, and is not to be started again all the same; a mistake stays one. Status 143
# alone may be of a SIGTERM that nobody asked for.
stopped() { [[ -e $STATE/stopping && ! $(cat "$STATE/status" 2>/dev/null) =~ ^[02]$ ]]; }

ended() {   # the status of a run that has ended
  if stopped; then
    echo 143
  elif [[ -s $STATE/status ]]; then
    cat "$STATE/status"
  else
    echo 137
  fi
}

stop() {
  mkdir -p "$STATE"
  touch "$STATE/stopping"
  running || say "$(hostname): no run is going; if its launcher still is, it starts none"
  end
}

end() {
  local pid i
  running || return 0
  pid=$(cat "$STATE/pid")
  pkill -TERM --session "$pid" || true
  for ((i = 0; i < ${STOP_SECONDS:-120}; i++)); do
    running || return 0
    sleep 1
  done
  pkill -KILL --session "$pid" || true
  while running; do sleep 0.1; done
}

action=${1:-}
shift || true
case $action in
  setup | start | follow | state | stop | end) "$action" "$@" ;;
  exec) prepare "$@"; exec "${COMMAND[@]}" ;;
  --help | -h) usage "$0" ;;
  *) die "$action: no such action; give setup, start, follow, state, stop, end or exec" ;;
esac
