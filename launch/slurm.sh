#!/usr/bin/env bash
# launch/slurm.sh [run] --config=FILE --workdir=FOLDER [--nodes=2] [--gpus_per_node=8] [--config.a.b=c]
#
# A run on GPUs of one node or several, by srun: a process a GPU, which JAX finds by SLURM's variables.
# Inside an allocation (salloc, sbatch) it takes that one; else srun asks for one. If a process is lost, or
# the job preempted, the others have --patience to save, or to say where they stood; then all start again
# from the last checkpoint.
#
#   run (default), status, stop (saves, and is not started again)
#
#   --name=longctx          of the job
#   --partition= --account= --time=    srun's own, where the cluster wants them
#   --restarts=3            how often a run that failed or was preempted is started again
#   --patience=120          seconds for the others, once a process has left
#   --dry_run               print each command

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
OPTION=([workdir]='' [nodes]=1 [gpus_per_node]=8 [name]=longctx [partition]='' [account]='' [time]=''
  [restarts]=3 [patience]=120)

main() {
  read_arguments 'run status stop' "$@"
  check_name
  case $ACTION in
    status) status ;;
    stop) stop ;;
    run)
      need_config
      check_number nodes 1
      check_number gpus_per_node 1
      check_number restarts 0
      check_number patience 1
      check_workdir 1 'this host'
      need_command srun 'start this on a login node or in an allocation of SLURM'
      mark_run
      with_restarts step
      ;;
  esac
}

# mark_workdir: a line in WORKDIR/.seen, by which each node sees that it has the same folder; anew at each start, since
# a second launcher of this workdir, which its lock refuses, has left its own.
mark_workdir() {
  SEEN=()
  if [[ ${OPTION[workdir]} == gs://* ]] || ((OPTION[nodes] == 1)); then return; fi
  SEEN=("--seen=$HOSTNAME.$$")
  if ! $DRY_RUN; then
    mkdir -p "${OPTION[workdir]}" || exit 2
    echo "$HOSTNAME.$$" >"${OPTION[workdir]}/.seen"
  fi
}

# mark_run: MARK, a file in the home folder, where `stop` writes: a run that saved and left with 75 is started
# again where the cluster asked for it, and not where the user did. Its first line is the allocation that the run is a
# step of, if any: there --name is the step's alone, and by it neither scancel nor squeue find the job.
mark_run() {
  MARK=$STATE/slurm.${OPTION[name]}.$HOSTNAME.$$
  if $DRY_RUN; then return; fi
  mkdir -p "$STATE" || exit 2
  echo "${SLURM_JOB_ID:-}" >"$MARK"
  trap 'rm -f "$MARK"' EXIT
}

asked_to_stop() { [[ $(<"$MARK") == *stopping ]]; }   # opened: else news of a file on NFS is late

# read_marks: MARKS of the launchers of this name; ALLOCATIONS, whose steps the runs of some are.
read_marks() {
  local mark job
  declare -A jobs=()
  MARKS=()
  for mark in "$STATE/slurm.${OPTION[name]}."*; do
    read -r job 2>/dev/null <"$mark" || continue
    MARKS+=("$mark")
    if [[ -n $job ]]; then jobs[$job]=1; fi
  done
  ALLOCATIONS=("${!jobs[@]}")
}

status() {
  local job
  read_marks
  run squeue --me "--name=${OPTION[name]}"
  for job in "${ALLOCATIONS[@]}"; do run squeue "--jobs=$job" || true; done   # one may have ended
}

stop() {
  local mark
  read_marks
  $DRY_RUN || for mark in "${MARKS[@]}"; do echo stopping >>"$mark"; done
  if ((${#MARKS[@]} == 0)); then
    say "${OPTION[name]}: no launcher of it has left a mark in $STATE; one whose home folder is another starts the" \
      'run again: end it first'
  fi
  # With --signal, without --batch or --full: all steps of an allocation and not its batch script; it stays the user's.
  if ((${#ALLOCATIONS[@]})); then run scancel --signal=TERM "${ALLOCATIONS[@]}" || true; fi   # one may have ended
  run scancel --me "--name=${OPTION[name]}" --state=PENDING || true   # a signal does not reach one that waits
  run scancel --me "--name=${OPTION[name]}" --signal=TERM   # saves, and leaves
}

step() {
  local name more=() distributed=() errors code=0
  for name in partition account time; do
    if [[ -n ${OPTION[$name]} ]]; then more+=("--$name=${OPTION[$name]}"); fi
  done
  if ((OPTION[nodes] * OPTION[gpus_per_node] > 1)); then distributed=(--distributed); fi
  mark_workdir
  errors=$(mktemp)
  { run srun "--job-name=${OPTION[name]}" "--nodes=${OPTION[nodes]}" \
    "--gpus-per-node=${OPTION[gpus_per_node]}" "--ntasks-per-node=${OPTION[gpus_per_node]}" \
    --kill-on-bad-exit=0 "--wait=${OPTION[patience]}" --label "${more[@]}" \
    bash "$HERE/worker.sh" exec --platform=gpu "${SEEN[@]}" "${MAIN[@]}" "--workdir=${OPTION[workdir]}" \
    "${distributed[@]}" 2>&1 1>&4 | tee "$errors" >&2; } 4>&1 || code=$?
  # Not killed at the first bad status: who saves leaves with 75, and the others may still be saving.
  # srun's status is the highest: the killing of the others hides the mistake of one.
  if ((code)) && grep -qE 'Exited with exit code 2$' "$errors"; then code=2; fi
  if ((code == 75)) && asked_to_stop; then
    say 'stopped, and saved; the same command carries on'
    code=0
  elif ((code)); then
    say "lost: $(grep -E 'task' "$errors" | paste -sd ';' || true)"
    if ((code != 2)) && asked_to_stop; then code=143; fi   # it could not save; asked to stop it is, all the same
  fi
  rm -f "$errors"
  return "$code"
}

main "$@"
