#!/usr/bin/env bash
# What the launchers share; sourced. A launcher fills OPTION with its options and their defaults, then
# calls `read_arguments "$@"`. A mistake of the user's ends in one line and exit status 2.
# Held by: tests/test_launch.py.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
cd "$ROOT"   # every path is relative to it, here as on a worker
STATE=${LONGCTX_STATE:-$HOME/.longctx}   # of runs, on this host
exec 3>&1    # a dry run's commands, also of calls whose output is read

say() { printf 'launch: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }
quoted() { local words; printf -v words ' %q' "$@"; printf '%s' "${words:1}"; }

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  die "bash $BASH_VERSION: too old; install bash 5.1 or newer and start this with it"
fi
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$ROOT/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi

# Arguments.

declare -A OPTION
DRY_RUN=false
ACTION=run
MAIN=()   # --config and all that main.py alone reads, as given

# usage FILE: the comment at the head of a launcher.
usage() { sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$1"; }

# read_arguments ACTIONS ARGUMENTS...: fills OPTION, ACTION, DRY_RUN and MAIN.
read_arguments() {
  local actions=$1 argument name
  shift
  if (($#)) && [[ $1 != -* ]]; then
    ACTION=$1
    shift
  fi
  [[ " $actions " == *" $ACTION "* ]] || die "$ACTION: no such action; give one of: $actions"
  for argument in "$@"; do
    name=${argument%%=*}
    name=${name#--}
    case $argument in
      --help | -h) usage "$0"; exit 0 ;;
      --dry_run | --dry_run=true) DRY_RUN=true ;;
      --dry_run=false) ;;
      --config=* | --config.*=* | --mode=* | --checkpoint=* | --allow_config_change=*) MAIN+=("$argument") ;;
      --*=*)
        [[ -v OPTION[$name] ]] || die "$(unknown "$name")"
        if [[ ${OPTION[$name]} =~ ^(true|false)$ && ! ${argument#*=} =~ ^(true|false)$ ]]; then
          die "$argument: must be true or false"
        fi
        OPTION[$name]=${argument#*=} ;;
      --*)
        [[ -v OPTION[$name] ]] || die "$(unknown "$name")"
        [[ ${OPTION[$name]} == false ]] || die "--$name: has no value; write --$name=VALUE"
        OPTION[$name]=true ;;
      *) die "$argument: not an argument; all begin with --, and the action ($actions) comes first" ;;
    esac
  done
}

unknown() {
  local names
  names=$(printf '%s\n' "${!OPTION[@]}" | sort | paste -sd ' ')
  echo "--$1: no such argument; there are --config=FILE, --config.KEY=VALUE, --dry_run, and: $names"
}

need_config() {
  [[ " ${MAIN[*]}" == *' --config='* ]] ||
    die '--config: missing; give a config file, such as --config=configs/quickstart.py'
}

# check_config: that workers will have --config=FILE[:VARIANT]; they get the repository without .venv, runs and .git.
check_config() {
  local argument path
  for argument in "${MAIN[@]}"; do
    [[ $argument == --config=* ]] || continue
    path=${argument#*=}
    path=${path%%:*}
    while [[ $path == ./* ]]; do path=${path#./}; done
    case /$path in
      //* | */../* | /.venv/* | /runs/* | /.git/*)
        die "$argument: the workers will not have this file: they get the repository without .venv, runs and .git;" \
          "give a path from its root, such as --config=configs/mine.py" ;;
    esac
  done
}

check_number() {   # check_number NAME LOW
  local value=${OPTION[$1]}
  if ! [[ $value =~ ^[0-9]+$ ]] || ((value < $2)); then
    die "--$1=$value: must be a whole number of at least $2"
  fi
}

check_name() {   # names of slices, jobs and JobSets
  [[ ${OPTION[name]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name=${OPTION[name]}: must begin with a small letter and have small letters, digits and" \
      "hyphens, at most 40"
}

# Commands.

# run COMMAND...: does it, or in a dry run prints it.
run() {
  if $DRY_RUN; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

need_command() {   # need_command NAME WHERE
  $DRY_RUN || command -v "$1" >/dev/null || die "$1: not found; $2, or look with --dry_run"
}

# with_restarts COMMAND...: again while it fails, OPTION[restarts] times at most, unless the launcher was `asked_to_stop`
# (status 143 alone may be a SIGTERM of the cluster's that came before its handler). Status 2, a mistake in the
# arguments, and 130, an interruption, do not mend themselves.
with_restarts() {
  local code restarts=0
  while true; do
    code=0
    "$@" || code=$?
    case $code in 0 | 2 | 130) return "$code" ;; esac
    if asked_to_stop; then return "$code"; fi
    if ((restarts >= OPTION[restarts])); then
      say "given up with status $code after $restarts restarts (--restarts=${OPTION[restarts]}); the same" \
        "command carries on from the last checkpoint"
      return "$code"
    fi
    restarts=$((restarts + 1))
    say "restart $restarts of ${OPTION[restarts]}, from the last checkpoint"
  done
}

# A platform that is not there is an error, rather than a run on something else.
declare -A JAX_PLATFORMS_OF=([cpu]=cpu [gpu]='cuda,cpu' [tpu]='tpu,cpu')

# flags_of PLATFORM: fills ENVIRONMENT with VARIABLE=FLAGS from xla_flags.txt.
flags_of() {
  local platform variable flag variables
  declare -A variables=()
  while read -r platform variable flag _; do
    if [[ $platform == "$1" ]]; then variables[$variable]+="$flag "; fi
  done <"$HERE/xla_flags.txt"
  ENVIRONMENT=()
  for variable in "${!variables[@]}"; do
    ENVIRONMENT+=("$variable=${variables[$variable]% }${!variable:+ ${!variable}}")
  done
}

# Slices of TPUs.

# read_slice: ACCELERATOR, CHIPS, HOSTS, RUNTIME, GKE_ACCELERATOR of OPTION[slice].
read_slice() {
  local name known
  [[ -n ${OPTION[slice]} ]] ||
    die '--slice: missing; give a TPU slice, such as --slice=v5e:4x4; launch/README.md says what fits'
  while read -r name ACCELERATOR CHIPS HOSTS RUNTIME GKE_ACCELERATOR; do
    if [[ $name == "${OPTION[slice]}" ]]; then return; fi
  done <"$HERE/slices.txt"
  known=$(awk '!/^#/ {print $1}' "$HERE/slices.txt" | paste -sd ' ')
  die "--slice=${OPTION[slice]}: no such slice; there are $known"
}

# setting NAME PROPERTY EXAMPLE: OPTION[NAME], else what gcloud is configured with.
setting() {
  if [[ -z ${OPTION[$1]} ]] && command -v gcloud >/dev/null; then
    OPTION[$1]=$(gcloud config get-value "$2" 2>/dev/null || true)
  fi
  [[ -n ${OPTION[$1]} ]] || die "--$1: not set; give --$1=$3, or: gcloud config set $2 $3"
}

# check_fit: compiles the step for the slice with the TPU's own compiler, before the slice is asked for.
check_fit() {
  local folder code=0
  case ${OPTION[check]} in
    none) return ;;
    compile | plan) ;;
    *) die "--check=${OPTION[check]}: must be compile, plan (quicker, within 10 %) or none" ;;
  esac
  folder=$(mktemp -d)
  $DRY_RUN || say "compiling the step for ${OPTION[slice]} (--check=plan is quicker, --check=none skips it)"
  flags_of tpu
  run env "${ENVIRONMENT[@]}" JAX_PLATFORMS=cpu "$PYTHON" -m longctx.main "${FIT[@]}" \
    "--mode=${OPTION[check]}" "--topology=${OPTION[slice]}" "--workdir=$folder" || code=$?
  rm -rf "$folder"
  case $code in
    0) ;;
    2) die 'nothing was asked for; mend what stands above' ;;
    *) die "--slice=${OPTION[slice]}: the step does not fit, or did not compile, as said above; nothing" \
      "was asked for. Give a larger --slice, a smaller --config.data.length, or what --mode=plan names" ;;
  esac
}

# fit_arguments: FIT, what of MAIN the check takes.
fit_arguments() {
  local argument
  FIT=()
  for argument in "${MAIN[@]}"; do
    case $argument in
      --mode=* | --checkpoint=* | --allow_config_change=*) ;;
      *) FIT+=("$argument") ;;
    esac
  done
}

# Workdirs.

# check_workdir HOSTS WHERE: a local path is for one host alone.
check_workdir() {
  local workdir=${OPTION[workdir]}
  [[ -n $workdir ]] ||
    die '--workdir: missing; give a folder, such as --workdir=runs/a, or a bucket,' \
      '--workdir=gs://BUCKET/runs/a'
  if [[ $workdir == gs:* ]]; then
    [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]+/[^/]+ ]] ||
      die "--workdir=$workdir: must be gs://BUCKET/FOLDER, such as gs://my-bucket/runs/a"
  elif (($1 > 1)); then
    die "--workdir=$workdir: a local path, which the other hosts of $2 ($1 hosts) do not see; give a" \
      "bucket, --workdir=gs://BUCKET/FOLDER, which every worker mounts"
  fi
}

# mount_workdir WORKDIR: WORKDIR_HERE, its path on this host; a bucket is mounted with gcsfuse under
# GCS_ROOT (~/gcs). Processes of one host wait for each other.
mount_workdir() {
  local bucket folder pause error mounting
  WORKDIR_HERE=$1
  if [[ $1 != gs://* ]]; then return; fi
  bucket=${1#gs://}
  bucket=${bucket%%/*}
  folder=${GCS_ROOT:-$HOME/gcs}/$bucket
  WORKDIR_HERE=${GCS_ROOT:-$HOME/gcs}/${1#gs://}
  if $DRY_RUN; then
    run gcsfuse "${GCSFUSE[@]}" "$bucket" "$folder"
    return
  fi
  mkdir -p "$folder"
  (
    flock 9
    mounting=$(mktemp) && trap 'rm -f "$mounting"' EXIT
    if ! mountpoint -q "$folder"; then
      command -v gcsfuse >/dev/null ||
        die "--workdir=$1: gcsfuse is not installed on $(hostname); install it (launch/README.md," \
          "Workdirs), or give a folder"
      for pause in 1 2 4 8 16 last; do
        # Into a file: the process that it leaves behind would keep a pipe open.
        if gcsfuse "${GCSFUSE[@]}" "$bucket" "$folder" >"$mounting" 2>&1 9>&-; then break; fi
        cat "$mounting" >&2
        if ! grep -qE "$MAY_PASS|$NETWORK" "$mounting"; then
          die "--workdir=$1: gcsfuse cannot mount $bucket; see that it is there and that this machine's" \
            "account may write to it"
        fi
        if [[ $pause == last ]]; then
          say "--workdir=$1: gcsfuse cannot mount $bucket on $(hostname) now, as said above; that may pass, and the" \
            'same command carries on'
          exit 75
        fi
        sleep "$pause"
      done
    fi
    for pause in 1 2 4 8 16 last; do
      if error=$(renames_folders "$WORKDIR_HERE" 2>&1); then exit 0; fi
      if ! [[ $error =~ $MAY_PASS ]]; then break; fi
      if [[ $pause == last ]]; then
        say "--workdir=$1: $bucket cannot be written to on $(hostname): ${error##*$'\n'}; that may pass, and the" \
          'same command carries on'
        exit 75
      fi
      sleep "$pause"
    done
    die "--workdir=$1: $bucket cannot be written to, or cannot rename a folder in one step, by which a" \
      "checkpoint is whole or not there${error:+ (${error##*$'\n'})}; give a bucket with a hierarchical" \
      "namespace: gcloud storage buckets create gs://NAME --location=REGION --uniform-bucket-level-access" \
      "--enable-hierarchical-namespace"
  ) 9>"${TMPDIR:-/tmp}/longctx-mount-$UID-$bucket.lock"
}
# What other hosts write is seen at once.
GCSFUSE=(--implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0)

# EIO, ETIMEDOUT, EAGAIN, ENOTCONN, ESTALE, EBUSY: of a bucket that is there, for a moment.
MAY_PASS='Input/output error|timed out|temporarily unavailable|Transport endpoint|Stale file handle|resource busy'
# And what gcsfuse says of a network, or of a service, that is not there for a moment.
NETWORK='Error 5[0-9][0-9]|i/o timeout|deadline exceeded|connection re(fused|set)|no such host|unreachable'

renames_folders() {
  local old=$1/.rename.$HOSTNAME.$BASHPID
  local -x LC_ALL=C
  if mkdir -p "$old" && : >"$old/file" && mv "$old" "$old.new" && rm -r "$old.new"; then return 0; fi
  rm -rf "$old" "$old.new" 2>/dev/null
  return 1
}
