#!/usr/bin/env bash
# Stands in for python -m longctx.main under launch/local.sh and launch/worker.sh: adds its call to CALLS.
# Process 2 of the first LOSSES attempts does what LOSS says; the others then wait for ever.
if [[ $1 == -c ]]; then echo 1234; exit; fi
call=$*
process=${call##*--process_id=}
[[ $process != "$call" ]] || process=0
echo "$XLA_FLAGS|$JAX_PLATFORMS|$JAX_NUM_CPU_DEVICES|$JAX_LOCAL_DEVICE_IDS|$*" >>"$CALLS.$process"
echo "process $process speaks"
attempts=$(grep -c . "$CALLS.$process")
if ((attempts <= ${LOSSES:-0})); then
  if ((process == ${LOST_PROCESS:-2})); then eval "$LOSS"; fi
  exec sleep 600
fi
