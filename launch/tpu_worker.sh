#!/usr/bin/env bash
# What launch/tpu_pod.sh and launch/gke_xpk.sh call on each worker:
#
#   install         makes the environment
#   main FLAGS      runs gradjax spectra
#   pod FLAGS       the same in a pod of Kubernetes that xpk made
#   start FLAGS     the same, detached; nothing if it is running
#   status [FLAGS]  one line: running, exited STATUS or not running (with these flags)
#   stop            ends the run
#   log [LINES]     the last lines of its log
#
# It lies in code/launch/ of a directory that also has
#
#   files/          the files named in flags, where the run is started
#   environment     HF_TOKEN, read by its owner only
#   venv/           the environment
#   log, flags, lock, pid, exit_status   of the detached run
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
here=$(dirname "$root")
VENV=$here/venv

install_environment() {
  # TPU machines come with an older Python.
  if [[ ! ${PYTHON:-} ]] && ! find_python python3.11 python3.12 python3.13 python3 >/dev/null; then
    python3 -m pip install --quiet --user uv
    python3 -m uv python install 3.12
    PYTHON=$(python3 -m uv python find --no-project --managed-python 3.12)
  fi
  ensure_environment requirements-tpu.txt
}

main() {
  if [[ -e $here/environment ]]; then
    # shellcheck source=/dev/null
    source "$here/environment"
  fi
  cd "$here/files"
  exec "$VENV/bin/python" -P -m gradjax.main "$@"
}

# xpk starts a pod again that ended with status 127 or more. 137 is what the kernel leaves of a
# process that it killed for lack of memory; the same would happen again, so that it becomes 1.
pod() {
  local status=0 pid score
  score=$(cat /proc/self/oom_score_adj)
  if [[ ${KUBERNETES_SERVICE_HOST:-} ]]; then
    # There the kernel kills all of a container together, but for processes of this score.
    for pid in 1 "$PPID" $$; do echo -1000 >"/proc/$pid/oom_score_adj" || true; done
  fi
  bash -c 'echo "$1" >/proc/self/oom_score_adj; exec bash "${@:2}"' \
    bash "$score" "$0" main "$@" || status=$?
  if ((status == 137)); then
    fail "the run was killed, as the kernel does where memory is short, and is not started again;" \
      "take fewer --batch_tokens, --mesh=fsdp:N or machines with more memory, and run it again."
  fi
  return "$status"
}

# wait_for_end SECONDS: fails if a run still holds the lock then, as whatever is left of it does.
wait_for_end() {
  flock --shared --timeout "$1" 8
} 8>>"$here/lock"

has_flags() {
  cmp -s "$here/flags" <(printf '%s\0' "$@")
}

start() {
  exec 9>"$here/lock"
  # Not --nonblock: a status may look at it this very moment.
  if ! flock --timeout 1 9; then
    echo "$(hostname) is running already"
    return
  fi
  rm -f "$here/exit_status"
  printf '%s\0' "$@" >"$here/flags"
  # A session of its own outlives the connection; it keeps descriptor 9 and with it the lock.
  setsid bash "$0" supervise "$@" </dev/null >>"$here/log" 2>&1 &
  echo $! >"$here/pid"
  echo "$(hostname) started"
}

supervise() {
  local status=0
  echo "gradjax: started on $(hostname) at $(date)"
  bash "$0" main "$@" || status=$?
  echo "gradjax: exited with status $status at $(date)"
  echo "$status" >"$here/exit_status"
}

status() {
  local state="not running"
  if ! wait_for_end 0; then
    state=running
    if (($#)) && ! has_flags "$@"; then state="running with other flags"; fi
  elif [[ -e $here/exit_status ]] && { (($# == 0)) || has_flags "$@"; }; then
    state="exited $(cat "$here/exit_status")"
  fi
  echo "$(hostname) $state"
}

stop() {
  if ! wait_for_end 0; then
    kill -TERM -- "-$(cat "$here/pid")"
    wait_for_end 30 || kill -KILL -- "-$(cat "$here/pid")"
  fi
  echo "$(hostname) stopped"
}

log() {
  tail -n "${1:-100}" "$here/log" | sed "s/^/$(hostname): /"
}

case $1 in
  install) install_environment ;;
  main | pod | start | supervise | status | stop | log) "$@" ;;
  *) fail "launch/tpu_worker.sh $1: expected one of the commands that it begins with." ;;
esac
