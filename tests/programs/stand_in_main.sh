#!/usr/bin/env bash
# Stands in for python -m longctx.main under launch/local.sh and launch/worker.sh: adds its call to CALLS.N.
# LOST_PROCESS (2, or all) of the first LOSSES attempts does what LOSS says, once all have been called; the
# others do what OTHERS says, or wait for ever.
if [[ $1 == -c ]]; then echo 1234; exit; fi
process=0
number=1
for argument in "$@"; do
  case $argument in
    --process_id=*) process=${argument#*=} ;;
    --num_processes=*) number=${argument#*=} ;;
  esac
done
calls_of() { grep -c . "$CALLS.$1" 2>/dev/null || true; }
echo "$XLA_FLAGS|$JAX_PLATFORMS|$JAX_NUM_CPU_DEVICES|$JAX_LOCAL_DEVICE_IDS|$*" >>"$CALLS.$process"
echo "process $process speaks"
attempts=$(calls_of "$process")
if ((attempts <= ${LOSSES:-0})); then
  if [[ ${LOST_PROCESS:-2} == all || ${LOST_PROCESS:-2} == "$process" ]]; then
    for ((i = 0; i < number; i++)); do
      until (($(calls_of "$i") >= attempts)); do sleep 0.02; done
    done
    eval "$LOSS"
  fi
  eval "${OTHERS:-exec sleep 600}"
fi
