#!/usr/bin/env bash
# Runs gradjax on a Cloud TPU pod: bash launch/tpu_pod.sh COMMAND [settings] -- [flags of spectra]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
  cat <<'END'
Runs gradjax on a Cloud TPU pod.

  bash launch/tpu_pod.sh COMMAND [settings] -- [flags of gradjax spectra]

  all       up and run; asks for new machines when these are preempted; at the end collect, delete
  up        asks for the machines and waits until they are there
  run       installs on every worker and starts the run there, detached; nothing if it is running
  status    what the machines and the run on every worker are doing
  logs      the last lines of every worker's log
  stop      ends the run
  collect   copies the results to runs/NAME and the logs to runs/NAME-logs
  delete    gives the machines back; they cost until then

  --type=TYPE         accelerator, as in v5litepod-16, v5p-32, v6e-64 (up and all need it)
  --zone=ZONE         where it is (default: $CLOUDSDK_COMPUTE_ZONE)
  --project=PROJECT   who pays (default: $CLOUDSDK_CORE_PROJECT)
  --name=gradjax      of the machines; one run per name
  --runtime=VERSION   of the machines' software (default: the one for the type)
  --spot              cheaper machines that may be taken away at any time
  --keep_on_error     all keeps the machines if the results cannot be copied, to look at them
  --dry_run           shows the commands, runs none

  bash launch/tpu_pod.sh all --type=v5litepod-16 --zone=us-west4-a --project=mine --spot -- \
    --model=qwen2.5_7b --data=good=high.jsonl --output_dir=gs://bucket/high

  bash launch/tpu_pod.sh status --zone=us-west4-a --project=mine

Every command may be given again at any time: a run goes on where it stopped, machines that were
preempted or failed are asked for anew. Results go to a bucket, since disks go with the machines. A
run has ended when every worker says so. An error of it keeps the machines, where the same command
goes on; all gives them back whether or not the results could be copied, which collect does later.
Workers get the last commit of this repository, the files named by --data and --flagfile, and
HF_TOKEN if it is set here. Before the first use: gcloud auth login, and for pods with several
workers ssh-add ~/.ssh/google_compute_engine. POLL_SECONDS (default 30) is the time between looks.
END
}

# --- Machines ---

ask_for_machines() {
  local spot_tier=()
  if [[ $spot ]]; then spot_tier=(--spot); fi
  say "asking for $type in $zone as $name"
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$runtime" "${spot_tier[@]}" </dev/null &&
    expected_state=ACTIVE
}

give_back() {
  say "giving $name back"
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet </dev/null ||
    fail "$name was not given back and still costs; gcloud's message is above."
  expected_state=ABSENT
}

# Sets state: ABSENT, ACTIVE, ... as the queued resource says, under dry_run the expected one; and
# size, the number of workers, 0 if it is not known.
look() {
  local error node attempt
  size=0
  local describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}")
  if [[ $dry_run ]]; then
    run "${describe[@]}" "--format=value(state.state)"
    state=$expected_state size=1
    return
  fi
  for attempt in 1 2 3 4 5; do
    if state=$("${describe[@]}" "--format=value(state.state)" 2>"$stage/error"); then
      # Machines may be gone before the resource says so.
      node=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
        "--format=value(state,networkEndpoints.len())" 2>/dev/null) || node=""
      read -r node size <<<"$node"
      if [[ $state == ACTIVE && $node == @(PREEMPTED|TERMINATED) ]]; then state=SUSPENDED; fi
      return
    fi
    error=$(cat "$stage/error")
    if [[ $error == *NOT_FOUND* ]]; then
      state=ABSENT
      return
    fi
    say "gcloud does not say how $name is (attempt $attempt of 5): $error"
    pause
  done
  fail "gcloud does not say how $name is; its messages are above."
}

pause() {
  run sleep "${POLL_SECONDS:-30}"
}

# Returns when the machines are there; asks for them where they are not there or not any more.
up() {
  local asked="" told=""
  while look && [[ $state != ACTIVE ]]; do
    case $state in
      ABSENT)
        if ! ask_for_machines; then
          look # somebody else may have been faster
          [[ $state != ABSENT ]] || fail "gcloud refused $type in $zone; its message is above."
        fi
        asked=yes
        ;;
      SUSPENDED)
        say "$name was preempted"
        give_back
        ;;
      FAILED)
        [[ ! $asked ]] || fail "$name failed; what gcloud knows: $(why_failed)"
        say "$name failed before"
        give_back
        ;;
      *)
        if [[ $state != "$told" ]]; then say "$name: $state"; fi
        told=$state
        pause
        ;;
    esac
  done
}

why_failed() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    "--format=value(state.failedData.error.message)" </dev/null
}

# --- Workers ---

# Runs a command on every worker.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet \
    --command="$1" </dev/null
}

on_workers_call() {
  on_workers "bash gradjax/code/launch/tpu_worker.sh $(quoted "$@")"
}

# Sets workers: a line per worker, under dry_run the expected one.
look_at_workers() {
  local command
  command="bash gradjax/code/launch/tpu_worker.sh $(quoted status "$@") 2>/dev/null"
  command+=" || echo \"\$(hostname) not installed\""
  if [[ $dry_run ]]; then
    on_workers "$command"
    workers=$expected_workers
  else
    workers=$(on_workers "$command")
  fi
}

install_on_workers() {
  say "installing on the workers of $name"
  pack &&
    # The key travels in a file that only its owner reads, never on a command line.
    run bash -c 'umask 077; declare -p HF_TOKEN >"$1" 2>/dev/null || true' bash \
      "$stage/environment" &&
    on_workers "umask 077 && mkdir -p gradjax" &&
    run gcloud compute tpus tpu-vm scp "$stage/code.tar.gz" "$stage/files.tar.gz" \
      "$stage/environment" "$name:gradjax/" "${where[@]}" --worker=all --quiet </dev/null &&
    run rm "$stage/environment" &&
    on_workers "cd gradjax && $unpack && bash code/launch/tpu_worker.sh install"
}

# Processes find each other at their start, so that one that has to start again takes all along.
start_run() {
  case $workers in *" running"*) on_workers_call stop || return ;; esac
  install_on_workers &&
    on_workers_call start "${flags[@]}" &&
    expected_workers="worker exited 0"
}

refuse_other_flags() {
  case $workers in
    *"with other flags"*)
      fail "a run with other flags is going on; wait until it ends (status), or end it (stop)."
      ;;
  esac
}

begin() {
  look_at_workers "${flags[@]}" || return
  refuse_other_flags
  case $workers in
    *" not "* | *"exited "[1-9]*) start_run ;;
    *" running"*) say "the run is going on already" ;;
    *) start_run ;;
  esac
}

# Whether every worker says that its run has ended well: one that cannot be heard may still run.
ended_well() {
  local lines
  lines=$(grep -c ' exited 0$' <<<"$workers") || true
  ((size && lines >= size)) || {
    say "${lines:-0} of ${size:-?} workers say that the run has ended"
    return 1
  }
}

# Brings a run that has begun to its end, whatever happens to machines on the way.
see_through() {
  local troubles=0
  while ((troubles < 10)); do
    up
    if look_at_workers "${flags[@]}"; then
      refuse_other_flags
      case $workers in
        *" not "*) start_run || ((troubles += 1)) ;;
        *" running"*) troubles=0 ;;
        *"exited "[1-9]*)
          on_workers_call log 20
          fail "a worker ended with an error, see above; the machines are still there: give the" \
            "same command to go on, or delete."
          ;;
        *)
          if ended_well; then return; fi
          ((troubles += 1))
          ;;
      esac
    else
      ((troubles += 1))
    fi
    pause
  done
  fail "the workers of $name cannot all be reached or started, see above; the machines are still" \
    "there: give the same command to go on, or delete."
}

# --- Commands ---

status() {
  look
  echo "$name: $state"
  if [[ $state == ACTIVE ]]; then
    look_at_workers
    echo "$workers"
  fi
}

collect() {
  local index copied=true
  run mkdir -p "runs/$name" "runs/$name-logs"
  run gcloud storage rsync --recursive "$output_dir" "runs/$name" --project="$project" || copied=""
  look
  if [[ $state == ACTIVE ]]; then
    for ((index = 0; index < size; index++)); do
      run gcloud compute tpus tpu-vm scp "$name:gradjax/log" "runs/$name-logs/worker-$index.log" \
        "${where[@]}" --worker="$index" --quiet </dev/null || say "worker $index has no log"
    done
  fi
  [[ $copied ]] ||
    fail "the results were not copied from $output_dir to runs/$name; gcloud's message is above."
  say "the store is in runs/$name"
}

# The machines cost, and what is in the bucket can be copied later.
collect_and_give_back() {
  local copied=true
  # A failure ends only this shell of its own.
  (collect) || copied=""
  if [[ ! $copied && $keep_on_error ]]; then
    fail "the machines are kept, as --keep_on_error says, and cost: give collect, then delete."
  fi
  give_back
  [[ $copied ]] || fail "the machines are given back; collect copies the results when it can."
}

delete() {
  look
  if [[ $state == ABSENT ]]; then say "there is no $name"; else give_back; fi
}

find_runtime() {
  case $type in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type=$type: expected a type like v5litepod-16; for another one name its --runtime." ;;
  esac
}

command=${1:---help}
if [[ $command == --help ]]; then
  usage
  exit
fi
need_checkout launch/tpu_pod.sh
name=gradjax type="" runtime="" spot="" keep_on_error=""
zone=${CLOUDSDK_COMPUTE_ZONE:-} project=${CLOUDSDK_CORE_PROJECT:-}
read_settings "name= type= zone= project= runtime= spot keep_on_error dry_run" "${@:2}"
[[ $name =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
  fail "--name=$name: expected up to 50 lower-case letters, digits and dashes, a letter first."
require zone "name the one that has the machines, as in --zone=us-west4-a, or set CLOUDSDK_COMPUTE_ZONE"
require project "name the one that pays, as in --project=PROJECT, or set CLOUDSDK_CORE_PROJECT"
case $command in
  all | up)
    require type "name the accelerator, as in --type=v5litepod-16"
    runtime=${runtime:-$(find_runtime)}
    ;;
esac
case $command in all | run | collect) prepare_remote_flags ;; esac
need gcloud "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
need git "install it"

where=(--zone="$zone" --project="$project")
stage=$root/build/launch/tpu-$name
if [[ ! $dry_run ]]; then
  mkdir -p "$stage"
  trap 'rm -f "$stage/environment" "$stage/error"' EXIT
fi
# What dry_run finds at the start.
expected_state=ACTIVE expected_workers="worker not installed"
case $command in
  all)
    expected_state=ABSENT
    up
    begin || true # what went wrong is tried again
    see_through
    collect_and_give_back
    ;;
  up)
    expected_state=ABSENT
    up
    ;;
  run) begin || fail "the run did not start on every worker; gcloud's message is above." ;;
  status | collect | delete) "$command" ;;
  logs) on_workers_call log ;;
  stop) on_workers_call stop ;;
  *) fail "$command: expected all, up, run, status, logs, stop, collect or delete (see --help)." ;;
esac
