#!/usr/bin/env bash
# launch/tpu.sh [run] --slice=v5e:4x4 --config=FILE --workdir=gs://BUCKET/FOLDER [--config.a.b=c]
#
# A run on a Cloud TPU slice of one host or many: compiles its step for the slice first, asks for the
# slice, waits, sets up every worker with this machine's versions, starts the run on all of them and
# follows worker 0. A slice that was preempted is made again, and the same command carries on. One of --name that is
# there is taken, if it is of the type that is asked for and no run is going on it.
# All paths are relative to the repository's root, which is what the workers get.
#
#   run (default), status, log, stop (the run; the slice stays), delete (the slice)
#
#   --name=longctx          of the slice and its request
#   --project= --zone=      as gcloud has them configured, if not given
#   --spot, --reserved      capacity that may be preempted; capacity that was reserved
#   --create=queued         a queued resource; direct: a TPU VM at once or not at all
#   --restarts=3            how often a run that failed is started again; preemptions are not counted
#   --delete_after          delete the slice when the run has ended
#   --check=compile         or plan, none: whether the step fits the slice, before it is asked for
#   --poll=30               seconds between two looks at the slice, and before what failed is asked again
#   --dry_run               print each command

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
OPTION=([workdir]='' [slice]='' [name]=longctx [project]='' [zone]='' [spot]=false [reserved]=false
  [create]=queued [restarts]=3 [delete_after]=false [check]=compile [poll]=30)

main() {
  read_arguments 'run status log stop delete' "$@"
  check_name
  check_number restarts 0
  check_number poll 0
  [[ ${OPTION[create]} =~ ^(queued|direct)$ ]] || die "--create=${OPTION[create]}: must be queued or direct"
  [[ ${OPTION[spot]} == false || ${OPTION[reserved]} == false ]] ||
    die '--spot and --reserved: give one of them'
  if [[ $ACTION == run ]]; then
    need_config
    check_config
    read_slice
    check_workdir "$HOSTS" "${OPTION[slice]}"
    if [[ ${OPTION[spot]} == true && ${OPTION[workdir]} != gs://* ]]; then
      die "--workdir=${OPTION[workdir]}: the slice's own disk, which goes with a --spot slice that is" \
        "preempted; give --workdir=gs://BUCKET/FOLDER"
    fi
  fi
  setting project project my-project
  setting zone compute/zone us-west4-a
  PLACE=("--project=${OPTION[project]}" "--zone=${OPTION[zone]}")
  need_command gcloud 'install the Google Cloud CLI'
  if [[ $ACTION != run ]]; then ATTEMPTS=3; fi   # somebody waits
  TEMPORARY=$(mktemp -d)
  trap 'rm -rf "$TEMPORARY"' EXIT
  case $ACTION in
    run) whole_run ;;
    status) status ;;
    log) on_workers 0 'follow 100' ;;
    stop) on_workers all stop ;;
    delete) delete_any ;;
  esac
}

RUN=$HOSTNAME.$$   # this launcher's name, for the workers
FOUND=true         # the slice was there before this launcher, and what is on it was not looked at

hint() {   # hint ACTION: the command that does it to this slice
  local kind=''
  if [[ ${OPTION[create]} != queued ]]; then kind=" --create=${OPTION[create]}"; fi
  echo "launch/tpu.sh $1 --name=${OPTION[name]} ${PLACE[*]}$kind"
}

whole_run() {
  local code
  check_agent
  fit_arguments
  check_fit
  trap left_alone INT TERM
  pack_code
  FAILURES=0
  while true; do
    ready_slice
    if $FOUND; then check_type; fi
    code=0
    { set_up && run_on_slice; } || code=$?
    if ((code != LOST)); then break; fi
    say "${OPTION[name]}: the slice was preempted or lost; making it again"
  done
  if [[ ${OPTION[delete_after]} == true ]]; then
    delete_slice
  elif ! $DRY_RUN; then
    say "the slice ${OPTION[name]} is still there, and costs: $(hint delete)"
  fi
  return "$code"
}

# check_agent: of several workers gcloud asks that an ssh-agent with any key has its own.
check_agent() {
  local key=$HOME/.ssh/google_compute_engine held fingerprint='' remedy='ssh-add ~/.ssh/google_compute_engine'
  if ((HOSTS == 1)) || $DRY_RUN; then return; fi
  held=$(ssh-add -l 2>/dev/null) || return 0   # no agent, or one without keys
  read -r _ fingerprint _ < <(ssh-keygen -lf "$key" 2>/dev/null) || true
  if [[ -z $held || (-n $fingerprint && $held == *"$fingerprint"*) ]]; then return; fi
  if [[ ! -e $key ]]; then remedy="ssh-keygen -t rsa -f ~/.ssh/google_compute_engine && $remedy"; fi
  die "ssh-add -l: the ssh-agent has other keys and not $key, without which gcloud does not reach the $HOSTS" \
    "workers of ${OPTION[slice]} at once; $remedy"
}

left_alone() {
  say "left alone: slice and run go on, and cost; $(hint 'log, stop or delete')"
  exit 130
}

LOST=99   # the status of set_up and run_on_slice where the slice is gone

# What is asked of gcloud is asked again where it fails: half an hour, for what may pass.
ATTEMPTS=10
FINAL='PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|NOT_FOUND|ALREADY_EXISTS|RESOURCE_EXHAUSTED|[Qq]uota'

pause() {   # pause ATTEMPT: --poll seconds, and each time twice as long, but no more than 5 minutes
  local seconds=$((OPTION[poll] << ($1 - 1)))
  sleep "$((seconds < 300 ? seconds : 300))"
}

# ask FINE COMMAND...: FINE is what gcloud says where nothing is left to do, if anything; MISSING: it said so at once.
ask() {
  local fine=$1 attempt code
  shift
  MISSING=false
  if $DRY_RUN; then
    run "$@"
    return
  fi
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    code=0
    { "$@" 2>&1 1>&4 | tee "$TEMPORARY/errors" >&2; } 4>&1 || code=$?
    if ((code == 0)) || { [[ -n $fine ]] && grep -q "$fine" "$TEMPORARY/errors"; }; then
      if ((code && attempt == 1)); then MISSING=true; fi
      return 0
    fi
    # 2: gcloud does not take the arguments. So many requests a minute: a quota that is soon there again.
    if ((code == 2)) || { grep -Eq "$FINAL" "$TEMPORARY/errors" && ! grep -q 'per minute' "$TEMPORARY/errors"; }; then
      return 1
    fi
    say "gcloud $(quoted "${@:4:2}") ${OPTION[name]}: failed (attempt $attempt of $ATTEMPTS), as said above"
    fine=${fine:-ALREADY_EXISTS}   # what failed may have come through
    if ((attempt < ATTEMPTS)); then pause "$attempt"; fi
  done
  return 1
}

# The slice.

# slice_state: none, waiting, ready, lost, halted or failed.
slice_state() {
  local said
  if [[ ${OPTION[create]} == direct ]]; then
    said=$(described tpu-vm state) || exit 2
  else
    said=$(described queued-resources state.state) || exit 2
    if [[ $said == ACTIVE ]]; then   # and stays so for a while when the slice was preempted
      said=$(described tpu-vm state) || exit 2
      if [[ $said == ABSENT ]]; then said=TERMINATED; fi
    fi
  fi
  case $said in
    ABSENT) echo none ;;
    READY) echo ready ;;
    FAILED) echo failed ;;
    SUSPENDED | PREEMPTED | TERMINATED) echo lost ;;
    STOPPED | STOPPING) echo halted ;;
    *) echo waiting ;;
  esac
}

described() {   # described KIND FIELD: what gcloud says, or ABSENT
  if $DRY_RUN; then
    run gcloud compute tpus "$1" describe "${OPTION[name]}" "${PLACE[@]}" "--format=value($2)"
    echo "${DRY_STATE:-ABSENT}"
    return
  fi
  local attempt
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    if gcloud compute tpus "$1" describe "${OPTION[name]}" "${PLACE[@]}" "--format=value($2)" \
      2>"$TEMPORARY/errors"; then
      return
    elif grep -q NOT_FOUND "$TEMPORARY/errors"; then
      echo ABSENT
      return
    elif grep -Eq 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT' "$TEMPORARY/errors"; then
      break
    fi
    say "gcloud does not tell the state of ${OPTION[name]} (attempt $attempt of $ATTEMPTS):" \
      "$(tail -n 1 "$TEMPORARY/errors")"
    if ((attempt < ATTEMPTS)); then pause "$attempt"; fi
  done
  die "gcloud cannot tell the state of ${OPTION[name]}: $(<"$TEMPORARY/errors")"
}

# ready_slice: makes the slice unless it is there, and waits until it is up.
ready_slice() {
  local state told=''
  while true; do
    state=$(slice_state) || exit 2
    if [[ $state != "$told" ]] && ! $DRY_RUN; then say "slice ${OPTION[name]} (${OPTION[slice]}): $state"; fi
    told=$state
    case $state in
      none) create_slice ;;
      waiting) sleep "${OPTION[poll]}" ;;
      ready) return ;;
      lost) delete_slice ;;
      halted) die "${OPTION[name]} was stopped by hand, and what is on its disks is still there; gcloud compute tpus" \
        "tpu-vm start ${OPTION[name]} ${PLACE[*]}, or $(hint delete), and this again" ;;
      failed) die "the request ${OPTION[name]} failed (gcloud compute tpus queued-resources describe" \
        "${OPTION[name]} ${PLACE[*]} says why); $(hint delete), then try another --zone or --slice" ;;
    esac
  done
}

# check_type: of a slice that was found.
check_type() {
  local said
  said=$(described tpu-vm acceleratorType) || exit 2
  [[ ${said:-ABSENT} =~ ^(ABSENT|"$ACCELERATOR")$ ]] ||
    die "--slice=${OPTION[slice]}: is a $ACCELERATOR, and the slice ${OPTION[name]} that is there a $said;" \
      "$(hint delete), or give another --name"
}

create_slice() {
  local more=()
  FOUND=false
  if [[ ${OPTION[spot]} == true ]]; then more+=(--spot); fi
  if [[ ${OPTION[reserved]} == true ]]; then more+=(--reserved); fi
  more+=(--scopes=https://www.googleapis.com/auth/cloud-platform)   # else the bucket is read-only
  if [[ ${OPTION[create]} == queued ]]; then
    ask '' gcloud compute tpus queued-resources create "${OPTION[name]}" "--node-id=${OPTION[name]}" \
      "${PLACE[@]}" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "${more[@]}" ||
      die "the slice was refused, as said above; look at the quota of ${OPTION[project]} in ${OPTION[zone]}"
  else
    ask '' gcloud compute tpus tpu-vm create "${OPTION[name]}" "${PLACE[@]}" \
      "--accelerator-type=$ACCELERATOR" "--version=$RUNTIME" "${more[@]}" ||
      die "the slice was refused, as said above; --create=queued waits for capacity"
  fi
  DRY_STATE=READY
}

other_kind() {
  if [[ ${OPTION[create]} == queued ]]; then OPTION[create]=direct; else OPTION[create]=queued; fi
}

# delete_any: the slice of this name, however it was made.
delete_any() {
  delete_slice
  if $MISSING; then
    other_kind
    delete_slice
  fi
  if $MISSING; then
    say "--name=${OPTION[name]}: no such slice in project ${OPTION[project]}, zone ${OPTION[zone]}, and nothing was" \
      "deleted; gcloud compute tpus tpu-vm list ${PLACE[*]} names those that are there"
    return 1
  fi
}

delete_slice() {
  local what=(tpu-vm delete "${OPTION[name]}" "${PLACE[@]}" --quiet)
  if [[ ${OPTION[create]} == queued ]]; then
    what=(queued-resources delete "${OPTION[name]}" "${PLACE[@]}" --force --quiet)
  fi
  ask NOT_FOUND gcloud compute tpus "${what[@]}" || {
    say "the slice ${OPTION[name]} could not be deleted, as said above, and may cost; $(hint delete)"
    exit 1
  }
}

# The workers.

on_workers() {   # on_workers all|0 COMMAND of worker.sh
  run gcloud compute tpus tpu-vm ssh "${OPTION[name]}" "${PLACE[@]}" "--worker=$1" --quiet \
    "--command=bash longctx/launch/worker.sh $2"
}

# pack_code: the repository as it stands, with the versions of this machine's environment.
pack_code() {
  if ! $DRY_RUN; then
    "$PYTHON" "$HERE/versions.py" >"$TEMPORARY/constraints.txt" || exit 2
    "$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' >"$TEMPORARY/python_version"
  fi
  run tar -czf "$TEMPORARY/longctx.tar.gz" --exclude=./.venv --exclude=./runs --exclude=./.git \
    --exclude=__pycache__ . -C "$TEMPORARY" constraints.txt python_version
}

# look: at a slice that was found: somebody's run is not stopped unasked. Fails where the workers do not answer.
look() {
  local states
  states=$(run gcloud compute tpus tpu-vm ssh "${OPTION[name]}" "${PLACE[@]}" --worker=all --quiet \
    '--command=[ ! -e longctx/launch/worker.sh ] || bash longctx/launch/worker.sh state') || return 1
  if grep -q 'running$' <<<"$states"; then
    die "--name=${OPTION[name]}: a run that this launcher did not start is going on this slice" \
      "($(paste -sd ';' <<<"$states")); $(hint stop), or give another --name"
  fi
  FOUND=false
}

# set_up: on every worker, or LOST; a slice that is just up may refuse the first connections.
set_up() {
  local attempt state tpu=(gcloud compute tpus tpu-vm) unpack='mkdir -p longctx && tar -xzf longctx.tar.gz -C longctx'
  for attempt in 1 2 3 4 5; do
    if { ! $FOUND || look; } &&
      run "${tpu[@]}" scp "$TEMPORARY/longctx.tar.gz" "${OPTION[name]}:" "${PLACE[@]}" --worker=all --quiet &&
      run "${tpu[@]}" ssh "${OPTION[name]}" "${PLACE[@]}" --worker=all --quiet \
        "--command=$unpack && bash longctx/launch/worker.sh setup --run=$RUN"; then
      return
    fi
    state=$(slice_state) || exit 2
    if [[ $state != ready ]]; then return "$LOST"; fi
    say "setting up the workers failed (attempt $attempt of 5)"
    if ((attempt < 5)); then pause "$attempt"; fi
  done
  die "the workers could not be set up, as said above; the slice ${OPTION[name]} is still there, and costs:" \
    "$(hint delete)"
}

# run_on_slice: starts and follows the run; its status, or LOST.
run_on_slice() {
  local arguments=("${MAIN[@]}" "--workdir=${OPTION[workdir]}") code state lines=+1 states started=false
  if ((HOSTS > 1)); then arguments+=(--distributed); fi
  while true; do
    code=0
    if ! $started; then
      on_workers all end || true   # what an earlier start has left
      if on_workers all "start --run=$RUN --platform=tpu $(quoted "${arguments[@]}")"; then started=true lines=+1; fi
    fi
    if $started; then
      on_workers 0 "follow $lines" || code=$?
      if ((code == 0)); then return 0; fi
    fi
    state=$(slice_state) || exit 2
    if [[ $state != ready ]]; then return "$LOST"; fi
    # The connection's status is not the run's.
    if ! states=$(on_workers all state); then
      states+=$'\nsome workers do not answer'
      sleep "${OPTION[poll]}"   # a slice that is being taken away is ready for a while
      state=$(slice_state) || exit 2
      if [[ $state != ready ]]; then return "$LOST"; fi
    fi
    if grep -q 'exited 2$' <<<"$states"; then
      on_workers all end || true
      say 'a mistake in the arguments or the files, as said above'
      return 2
    fi
    if grep -q 'stopped$' <<<"$states"; then   # status 143 alone may be of a SIGTERM that nobody asked for
      on_workers all end || true   # the others may still be saving
      say 'stopped, before it could save; the same command carries on from the last checkpoint'
      return 143
    fi
    if $started && ! grep -Evq '(running|exited 0)$' <<<"$states"; then   # the connection broke
      lines=20
      if ! grep -q 'running$' <<<"$states"; then
        on_workers 0 "follow $lines" || true   # what it has said since
        return 0
      fi
      sleep "${OPTION[poll]}"
      continue
    fi
    say "the run $($started && echo failed || echo 'did not start on all workers'); these say:" \
      "$(paste -sd ';' <<<"$states")"
    started=false
    if ((FAILURES >= OPTION[restarts])); then
      on_workers all end || true
      say "given up after $FAILURES restarts (--restarts=${OPTION[restarts]}); the same command carries on" \
        "from the last checkpoint"
      return 1
    fi
    FAILURES=$((FAILURES + 1))
    say "restart $FAILURES of ${OPTION[restarts]}, from the last checkpoint"
  done
}

status() {
  local state
  state=$(slice_state) || exit 2
  if [[ $state == none ]] && ! $DRY_RUN; then   # however it was made
    other_kind
    state=$(slice_state) || exit 2
  fi
  $DRY_RUN || echo "slice ${OPTION[name]} (project ${OPTION[project]}, zone ${OPTION[zone]}): $state"
  if [[ $state == ready ]] || $DRY_RUN; then on_workers all state; fi
}

main "$@"
