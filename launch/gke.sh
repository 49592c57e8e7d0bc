#!/usr/bin/env bash
# launch/gke.sh [run] --slice=v5e:4x4 --config=FILE --workdir=gs://BUCKET/FOLDER --image=IMAGE
#     --cluster=NAME [--config.a.b=c]
#
# A run on a TPU slice of a GKE cluster: compiles its step for the slice first, then submits a JobSet
# (launch/jobset.yaml), a pod a host, and follows the pod of process 0. GKE starts all pods again when
# one is lost or the slice is preempted; the run carries on from its last checkpoint.
#
#   run (default), image (build and push --image), manifest (print the JobSet), status, log, stop
#
#   --name=longctx          of the JobSet
#   --project= --zone=      as gcloud has them configured, if not given; --zone: the cluster's location
#   --spot, --reserved=NAME capacity that may be preempted; capacity that was reserved
#   --service_account=default   of Kubernetes; it must be allowed to write to the bucket
#   --restarts=10           of all pods; preemptions count, too
#   --xpk                   submit it with xpk (0.7.1 or newer), to a cluster that xpk made, with the bucket at /gcs/BUCKET
#   --check=compile         or plan, none: whether the step fits the slice, before it is asked for
#   --poll=30               seconds between two looks at the JobSet
#   --dry_run               print each command

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
OPTION=([workdir]='' [slice]='' [name]=longctx [project]='' [zone]='' [cluster]='' [image]='' [spot]=false
  [reserved]='' [service_account]=default [restarts]=10 [xpk]=false [check]=compile [poll]=30)

main() {
  read_arguments 'run image manifest status log stop' "$@"
  check_name
  check_number restarts 0
  check_number poll 0
  if [[ $ACTION =~ ^(run|manifest)$ ]]; then
    need_config
    check_config
    read_slice
    check_workdir "$HOSTS" "${OPTION[slice]}"
    [[ ${OPTION[workdir]} == gs://* ]] ||
      die "--workdir=${OPTION[workdir]}: a path in a pod, which goes with it; give" \
        "--workdir=gs://BUCKET/FOLDER"
    [[ ${OPTION[spot]} == false || -z ${OPTION[reserved]} ]] || die '--spot and --reserved: give one of them'
  fi
  if [[ $ACTION =~ ^(run|manifest|image)$ ]]; then
    [[ -n ${OPTION[image]} ]] ||
      die '--image: missing; give a container image, such as' \
        '--image=us-docker.pkg.dev/my-project/my-repository/longctx; launch/gke.sh image builds it'
  fi
  case $ACTION in
    manifest) manifest; return ;;
    image) image; return ;;
  esac
  [[ -n ${OPTION[cluster]} ]] ||
    die '--cluster: missing; give the GKE cluster, such as --cluster=my-cluster (gcloud container clusters' \
      'list)'
  setting project project my-project
  setting zone compute/zone us-west4-a
  need_command gcloud 'install the Google Cloud CLI'
  need_command kubectl 'gcloud components install kubectl'
  if [[ ${OPTION[xpk]} == true ]]; then need_command xpk 'pip install xpk'; fi
  if [[ $ACTION == run ]]; then
    fit_arguments
    check_fit
  fi
  run gcloud container clusters get-credentials "${OPTION[cluster]}" "--location=${OPTION[zone]}" \
    "--project=${OPTION[project]}"
  PODS=--selector=jobset.sigs.k8s.io/jobset-name=${OPTION[name]}
  FIRST=$PODS,batch.kubernetes.io/job-completion-index=0
  case $ACTION in
    run) submit; follow ;;
    status) run kubectl get "jobset/${OPTION[name]}"; run kubectl get pods "$PODS" --output=wide ;;
    log) run kubectl logs "$FIRST" "--container=$(container)" --tail=100 --follow ;;
    stop) stop ;;
  esac
}

container() { if [[ ${OPTION[xpk]} == true ]]; then echo jax-tpu; else echo longctx; fi; }

# worker_command: COMMAND, what each pod does.
worker_command() {
  COMMAND=(bash launch/worker.sh exec --platform=tpu "${MAIN[@]}" "--workdir=${OPTION[workdir]}")
  if ((HOSTS > 1)); then COMMAND+=(--distributed); fi
}

manifest() {
  local text bucket=${OPTION[workdir]#gs://} selectors=''
  worker_command
  if [[ ${OPTION[spot]} == true ]]; then selectors='cloud.google.com/gke-spot: "true"'; fi
  if [[ -n ${OPTION[reserved]} ]]; then
    selectors="cloud.google.com/reservation-name: $(json "${OPTION[reserved]}")"
  fi
  text=$(grep -v '^#' "$HERE/jobset.yaml")
  fill name "${OPTION[name]}"
  fill restarts "${OPTION[restarts]}"
  fill hosts "$HOSTS"
  fill service_account "$(json "${OPTION[service_account]}")"
  fill gke_accelerator "$GKE_ACCELERATOR"
  fill topology "${OPTION[slice]#*:}"
  fill selectors "$selectors"
  fill image "$(json "${OPTION[image]}")"
  fill chips_of_host "$((CHIPS / HOSTS))"
  fill bucket "${bucket%%/*}"
  fill command "[$(json "${COMMAND[@]}")]"   # last: it may have @ in it
  grep -v '^ *$' <<<"$text"
}

fill() { text=${text//"@$1@"/"$2"}; }

json() {   # strings, with commas between
  local one all=''
  for one in "$@"; do
    one=${one//\\/\\\\}
    one=${one//\"/\\\"}
    one=${one//$'\n'/\\n}
    all+=", \"${one//$'\t'/\\t}\""
  done
  printf '%s' "${all:2}"
}

image() {
  local versions
  need_command docker 'install Docker'
  if ! $DRY_RUN; then
    versions=$("$PYTHON" "$HERE/versions.py") || exit 2
    echo "$versions" >"$HERE/constraints.txt"
  fi
  run docker build --file=launch/Dockerfile "--tag=${OPTION[image]}" \
    "--build-arg=PYTHON_VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" .
  run docker push "${OPTION[image]}"
}

submit() {
  local more=() left there='' ended=''
  # What an earlier start has left, and has ended, would be taken for this one.
  if ! $DRY_RUN; then
    left=$(kubectl get "jobset/${OPTION[name]}" --ignore-not-found \
      '--output=jsonpath={.metadata.name} {.status.terminalState}') ||
      die "kubectl cannot tell whether a JobSet ${OPTION[name]} is there, as said above"
    read -r there ended <<<"$left"
    if [[ -n $ended ]]; then
      say "JobSet ${OPTION[name]}: $ended before; it is removed and made again, from the last checkpoint"
      stop
    elif [[ -n $there && ${OPTION[xpk]} == true ]]; then   # xpk would ask whether to overwrite it
      say "JobSet ${OPTION[name]}: is there and has not ended; it is followed as it was started (to start it" \
        'otherwise: launch/gke.sh stop first)'
      return
    fi
  fi
  if [[ ${OPTION[xpk]} == true ]]; then
    worker_command
    if [[ ${OPTION[spot]} == true ]]; then more+=(--spot); fi
    if [[ -n ${OPTION[reserved]} ]]; then more+=("--reservation=${OPTION[reserved]}"); fi
    # By itself xpk starts again what ended with 42 or 127 to 255: with all but 0 and 2.
    run xpk workload create "--workload=${OPTION[name]}" "--cluster=${OPTION[cluster]}" \
      "--project=${OPTION[project]}" "--zone=${OPTION[zone]}" "--tpu-type=$ACCELERATOR" --num-slices=1 \
      "--docker-image=${OPTION[image]}" "--max-restarts=${OPTION[restarts]}" \
      --restart-on-exit-codes=1,3-126 --termination-grace-period-seconds=120 "${more[@]}" \
      "--command=cd /longctx && GCS_ROOT=/gcs $(quoted "${COMMAND[@]}")"
    return
  fi
  manifest >"${TMPDIR:-/tmp}/${OPTION[name]}.jobset.yaml"
  run kubectl apply "--filename=${TMPDIR:-/tmp}/${OPTION[name]}.jobset.yaml"
}

# follow: the log of process 0, of each attempt's pod, until the JobSet has ended.
follow() {
  local ended='' there='' restarts=0 before=0 pod phase last='' failures=0
  local name_and_phase='{.items[0].metadata.name} {.items[0].status.phase}{"\n"}' log
  log=("--container=$(container)" --follow)
  while [[ -z $ended ]]; do
    run kubectl wait --for=condition=Ready pod "$FIRST" "--timeout=${OPTION[poll]}s" || true
    if $DRY_RUN; then
      run kubectl logs "$FIRST" "${log[@]}" --tail=-1
      run kubectl get "jobset/${OPTION[name]}" '--output=jsonpath={.status.terminalState}'
      return
    fi
    read -r pod phase < <(kubectl get pods "$FIRST" "--output=jsonpath=$name_and_phase") || true
    if [[ -n $pod && $pod != "$last" && $phase != Pending ]]; then   # one that is Pending has no log
      kubectl logs "$pod" "${log[@]}" --tail=-1 || true
      last=$pod
    elif [[ $phase == Running ]]; then   # the connection broke
      kubectl logs "$pod" "${log[@]}" --tail=20 || true
    fi
    if ended=$(kubectl get "jobset/${OPTION[name]}" '--output=jsonpath={.status.terminalState}') &&
      restarts=$(kubectl get "jobset/${OPTION[name]}" '--output=jsonpath={.status.restarts}'); then
      failures=0
    else
      if there=$(kubectl get "jobset/${OPTION[name]}" --ignore-not-found --output=name) && [[ -z $there ]]; then
        say "JobSet ${OPTION[name]}: is gone: it was stopped; the same command carries on from the last checkpoint"
        return 143
      fi
      failures=$((failures + 1)) ended='' restarts=$before
      ((failures < 10)) || die "kubectl has not answered 10 times; the JobSet may go on: launch/gke.sh log"
    fi
    if [[ ${restarts:=0} != "$before" ]]; then
      say "restart $restarts of ${OPTION[restarts]}, from the last checkpoint"
    fi
    before=$restarts
    if [[ -z $ended ]]; then sleep "${OPTION[poll]}"; fi
  done
  say "JobSet ${OPTION[name]}: $ended"
  [[ $ended == Completed ]]
}

stop() {
  if [[ ${OPTION[xpk]} == true ]]; then
    run xpk workload delete "--workload=${OPTION[name]}" "--cluster=${OPTION[cluster]}" \
      "--project=${OPTION[project]}" "--zone=${OPTION[zone]}" --force
  else
    run kubectl delete "jobset/${OPTION[name]}"
  fi
}

main "$@"
