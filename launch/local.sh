#!/usr/bin/env bash
# launch/local.sh --config=FILE --workdir=FOLDER [--processes=4] [--devices=2] [--config.a.b=c]
#
# Several processes of one run on this host: CPU processes, the way to rehearse a pod; or GPUs.
#
#   --platform=cpu    or gpu
#   --processes=4     of CPUs; 1 of GPUs, which has all of them (more: a GPU each)
#   --devices=2       CPU devices of each process
#   --restarts=3      how often the run is started again after a process was lost
#   --patience=90     seconds for the others' last words: they end by themselves within 15, 30 or 70,
#                     by what they do when one is lost, and are not waited for longer
#   --dry_run         print each command
#
# Process 0 speaks here, the others into WORKDIR/logs/process_N.log. If one is lost the others have
# --patience to say where they stood, then they are killed, since they would wait for it, and all start again
# from the last checkpoint. Ctrl-C and SIGTERM save and end the run; a second one kills it.

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
OPTION=([workdir]='' [platform]=cpu [processes]='' [devices]=2 [restarts]=3 [patience]=90)
PIDS=()
SIGNALS=0
STOPPED=75   # of a run that was asked to stop, and saved

main() {
  read_arguments run "$@"
  need_config
  check_workdir 1 'this host'
  [[ ${OPTION[platform]} =~ ^(cpu|gpu)$ ]] || die "--platform=${OPTION[platform]}: must be cpu or gpu"
  if [[ -z ${OPTION[processes]} ]]; then
    OPTION[processes]=$([[ ${OPTION[platform]} == cpu ]] && echo 4 || echo 1)
  fi
  check_number processes 1
  check_number devices 1
  check_number restarts 0
  check_number patience 0
  mount_workdir "${OPTION[workdir]}"
  trap 'forward TERM' INT TERM
  trap 'kill_all' EXIT
  with_restarts attempt
}

asked_to_stop() { ((SIGNALS)); }

forward() {
  SIGNALS=$((SIGNALS + 1))
  if ((SIGNALS > 1)); then kill_all; else kill -"$1" "${PIDS[@]}" 2>/dev/null || true; fi
}

kill_all() { if ((${#PIDS[@]})); then kill -KILL "${PIDS[@]}" 2>/dev/null || true; fi; }

# attempt: starts all processes and waits; 0 where all ended well.
attempt() {
  local number=${OPTION[processes]} port=PORT i logs=$WORKDIR_HERE/logs
  local command=("$PYTHON" -m longctx.main "${MAIN[@]}" "--workdir=$WORKDIR_HERE")
  flags_of "${OPTION[platform]}"
  ENVIRONMENT+=("JAX_PLATFORMS=${JAX_PLATFORMS_OF[${OPTION[platform]}]}")
  if [[ ${OPTION[platform]} == cpu ]]; then ENVIRONMENT+=("JAX_NUM_CPU_DEVICES=${OPTION[devices]}"); fi
  if ! $DRY_RUN; then
    mkdir -p "$logs" || return 2
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  fi
  if ((SIGNALS)); then return 130; fi   # one came between two attempts
  PIDS=()
  for ((i = 0; i < number; i++)); do
    local each=("${ENVIRONMENT[@]}") place=()
    if ((number > 1)); then
      place=("--coordinator_address=localhost:$port" "--num_processes=$number" "--process_id=$i")
      if [[ ${OPTION[platform]} == gpu ]]; then each+=("JAX_LOCAL_DEVICE_IDS=$i"); fi
    fi
    if $DRY_RUN; then
      run env "${each[@]}" "${command[@]}" "${place[@]}"
    elif ((i == 0)); then
      env "${each[@]}" "${command[@]}" "${place[@]}" &
      PIDS+=($!)
    else
      env "${each[@]}" "${command[@]}" "${place[@]}" >>"$logs/process_$i.log" 2>&1 &
      PIDS+=($!)
    fi
  done
  if ! $DRY_RUN; then watch_all; fi
}

# any_runs: whether one of the processes has not ended.
any_runs() {
  local pid
  for pid in "${PIDS[@]}"; do if kill -0 "$pid" 2>/dev/null; then return 0; fi; done
  return 1
}

# watch_all: waits for all; at the first that ends badly says which it was, and ends the others.
watch_all() {
  local pid code left=${#PIDS[@]}
  while ((left)); do
    pid=''
    code=0
    wait -n -p pid "${PIDS[@]}" 2>/dev/null || code=$?
    if [[ -z ${pid:-} ]]; then continue; fi   # a signal came: the processes have it too
    left=$((left - 1))
    local i
    for i in "${!PIDS[@]}"; do if [[ ${PIDS[i]} == "$pid" ]]; then break; fi; done
    unset 'PIDS[i]'
    if ((code == 0 || (code == STOPPED && SIGNALS))); then continue; fi
    say "process $i of ${OPTION[processes]} (pid $pid) was lost: $(ending "$code"); ending the others"
    if ((i > 0)); then tail -n 5 "$WORKDIR_HERE/logs/process_$i.log" >&2; fi
    local deadline=$((SECONDS + OPTION[patience]))
    while ((SECONDS < deadline && SIGNALS == 0)) && any_runs; do sleep 0.1 || true; done
    kill_all
    for i in "${!PIDS[@]}"; do wait "${PIDS[i]}" 2>/dev/null || true; done
    PIDS=()
    if ((SIGNALS)); then return 130; fi
    return "$code"
  done
  PIDS=()
}

ending() { if (($1 > 128)); then echo "killed by SIG$(kill -l $(($1 - 128)))"; else echo "status $1"; fi; }

main "$@"
