#!/usr/bin/env bash
# launch/slurm.sh [run] --config=FILE --workdir=FOLDER [--nodes=2] [--gpus_per_node=8] [--config.a.b=c]
#
# A run on GPUs of one node or several, by srun: a process a GPU, which JAX finds by SLURM's variables.
# Inside an allocation (salloc, sbatch) it takes that one; else srun asks for one. A process that is
# lost ends the others, and all start again from the last checkpoint.
#
#   run (default), status, stop
#
#   --name=longctx          of the job
#   --partition= --account= --time=    srun's own, where the cluster wants them
#   --restarts=3            how often a run that failed is started again
#   --dry_run               print each command

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
OPTION=([workdir]='' [nodes]=1 [gpus_per_node]=8 [name]=longctx [partition]='' [account]='' [time]=''
  [restarts]=3)

main() {
  read_arguments 'run status stop' "$@"
  check_name
  case $ACTION in
    status) run squeue --me "--name=${OPTION[name]}" ;;
    stop) run scancel --me "--name=${OPTION[name]}" --signal=TERM ;;   # saves, and leaves
    run)
      need_config
      check_number nodes 1
      check_number gpus_per_node 1
      check_number restarts 0
      check_workdir 1 'this host'
      need_command srun 'start this on a login node or in an allocation of SLURM'
      mark_workdir
      with_restarts step
      ;;
  esac
}

# mark_workdir: a line in WORKDIR/.seen, by which each node sees that it has the same folder.
mark_workdir() {
  SEEN=()
  if [[ ${OPTION[workdir]} == gs://* ]] || ((OPTION[nodes] == 1)); then return; fi
  SEEN=("--seen=$HOSTNAME.$$")
  if ! $DRY_RUN; then
    mkdir -p "${OPTION[workdir]}" || exit 2
    echo "$HOSTNAME.$$" >"${OPTION[workdir]}/.seen"
  fi
}

step() {
  local name more=() distributed=() errors code=0
  for name in partition account time; do
    if [[ -n ${OPTION[$name]} ]]; then more+=("--$name=${OPTION[$name]}"); fi
  done
  if ((OPTION[nodes] * OPTION[gpus_per_node] > 1)); then distributed=(--distributed); fi
  errors=$(mktemp)
  { run srun "--job-name=${OPTION[name]}" "--nodes=${OPTION[nodes]}" \
    "--gpus-per-node=${OPTION[gpus_per_node]}" "--ntasks-per-node=${OPTION[gpus_per_node]}" \
    --kill-on-bad-exit=1 --label "${more[@]}" \
    bash "$HERE/worker.sh" exec --platform=gpu "${SEEN[@]}" "${MAIN[@]}" "--workdir=${OPTION[workdir]}" \
    "${distributed[@]}" 2>&1 1>&4 | tee "$errors" >&2; } 4>&1 || code=$?
  # srun's status is the highest: the killing of the others hides the mistake of one.
  if ((code)) && grep -qE 'Exited with exit code 2$' "$errors"; then code=2; fi
  if ((code)); then say "lost: $(grep -E 'task' "$errors" | paste -sd ';' || true)"; fi
  rm -f "$errors"
  return "$code"
}

main "$@"
