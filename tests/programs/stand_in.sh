#!/usr/bin/env bash
# Stands in for gcloud, kubectl, srun, gcsfuse, python ... under each of their names: adds its call to
# CALLS, and gives the first answer of ANSWERS, not given yet, whose pattern the call matches. An answer
# is a line: pattern, status, output (with \n for new lines), with tabs between; a status with + after it
# is given each time. No answer: status 0.
call="${0##*/} $*"
echo "$call" >>"$CALLS"
number=0
while IFS=$'\t' read -r pattern status output; do
  number=$((number + 1))
  # shellcheck disable=SC2254
  case $call in
    $pattern)
      if [[ $status == *+ ]] || mkdir "$ANSWERS.$number" 2>/dev/null; then
        if [[ -n $output ]] && ((${status%+})); then
          printf '%b\n' "$output" >&2   # as commands do that fail
        elif [[ -n $output ]]; then
          printf '%b\n' "$output"
        fi
        exit "${status%+}"
      fi ;;
  esac
done <"$ANSWERS"
