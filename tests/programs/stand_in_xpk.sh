#!/usr/bin/env bash
# Stands in for xpk 1.16.0: refuses, as its argparse does, a flag that `workload create` or `workload delete`
# does not have (its parser/workload.py and parser/common.py); else as stand_in.sh.
SHARED='project project-number zone namespace dry-run skip-validation quiet sandbox-kubeconfig'
CREATE='workload cluster command tpu-type device-type storage num-nodes scheduler ramdisk-directory mtc-enabled
  debug-dump-gcs deploy-stacktrace-sidecar use-pathways restart-on-exit-codes docker-name use-parallel-containers
  output-manifest-file num-slices priority max-restarts ttl-seconds-after-finished
  termination-grace-period-seconds colocated-python-sidecar-image enable-debug-logs env-file env base-docker-image
  script-dir docker-image docker-image-pull-secret use-vertex-tensorboard experiment-name on-demand reservation
  spot flex'
DELETE='workload cluster filter-by-job filter-by-status force'
case "$1 $2" in
  'workload create') known="$SHARED $CREATE" ;;
  'workload delete') known="$SHARED $DELETE" ;;
  *) echo "xpk: error: argument: invalid choice: '$1 $2'" >&2; exit 2 ;;
esac
for argument in "${@:3}"; do
  flag=${argument%%=*}
  if [[ $flag != --* || " ${known//$'\n'/ } " != *" ${flag#--} "* ]]; then
    echo "xpk: error: unrecognized arguments: $argument" >&2
    exit 2
  fi
done
# shellcheck source=/dev/null
source "$(dirname "$(readlink -f "$0")")/stand_in.sh"
