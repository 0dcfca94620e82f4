#!/usr/bin/env bash
# Runs gradjax on a GKE cluster: bash launch/gke_xpk.sh COMMAND [settings] -- [flags of spectra]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
  cat <<'END'
Runs gradjax on the TPUs of a GKE cluster, with xpk.

  bash launch/gke_xpk.sh COMMAND [settings] -- [flags of gradjax spectra]

  run       puts the run into the cluster's queue; nothing if it is there already
  status    what the run and its pods are doing
  logs      the last lines of every pod's log
  delete    takes the run out of the cluster

  --cluster=CLUSTER   made with xpk cluster create
  --type=TYPE         accelerator, as in v5litepod-16 (run needs it)
  --num_slices=1      how many of them
  --zone=ZONE         where the cluster is (default: $CLOUDSDK_COMPUTE_ZONE)
  --project=PROJECT   whose it is (default: $CLOUDSDK_CORE_PROJECT)
  --name=gradjax      of the run in the cluster
  --dry_run           shows the commands, runs none

  bash launch/gke_xpk.sh run --cluster=tpus --type=v5litepod-16 --zone=us-west4-a --project=mine \
    -- --model=qwen2.5_7b --data=good=high.jsonl --output_dir=gs://bucket/high

Preempted pods are started again by the cluster, at most 20 times, and go on where they stopped; not
after an error, nor if the kernel killed the run because memory was short. A run that ended, for
whatever reason, goes on when the same command is given again. Results go to a bucket, since disks
go with the pods. Pods get the last commit of this repository and the files named by --data and
--flagfile, in an image that xpk builds with docker, and install requirements-tpu.txt when they
start. HF_TOKEN, if it is set here, becomes an environment variable of the pods.
END
}

# Sets state: that of the run in the cluster, "" if there is none, under dry_run the expected one.
look() {
  # xpk also points kubectl to the cluster.
  run xpk workload list "${where[@]}" --filter-by-job="$name" </dev/null ||
    fail "xpk cannot see the workloads of $cluster; its message is above."
  local query=(kubectl get jobset "$name" --namespace=default --ignore-not-found
    "--output=jsonpath={.metadata.name}:{.status.conditions[-1].type}")
  if [[ $dry_run ]]; then
    run "${query[@]}"
    state=$expected_state
  else
    state=$("${query[@]}" </dev/null) || fail "kubectl does not say how $name is; its message is above."
  fi
}

delete() {
  look
  if [[ ! $state ]]; then
    say "there is no $name in $cluster"
  else
    run xpk workload delete "${where[@]}" --workload="$name" --force </dev/null
  fi
}

submit() {
  local environment=() command
  look
  case $state in
    "") ;;
    *:Completed | *:Failed) run xpk workload delete "${where[@]}" --workload="$name" --force </dev/null ;;
    *)
      say "the run is in the cluster already (status, logs)"
      return
      ;;
  esac
  pack
  if [[ ${HF_TOKEN:-} ]]; then
    # Only the name: xpk takes the value from its environment.
    run bash -c 'echo HF_TOKEN >"$1"' bash "$stage.env"
    environment=(--env-file="$stage.env")
  fi
  command="$unpack && bash code/launch/tpu_worker.sh install"
  command+=" && bash code/launch/tpu_worker.sh pod $(quoted "${flags[@]}")"
  # Kubernetes reads $$ as $ and may replace $(NAME). A restart follows what ends pods from outside
  # (xpk: exit status 127 and more), not an error of gradjax nor a lack of memory (see pod).
  run xpk workload create "${where[@]}" --workload="$name" --tpu-type="$type" \
    --num-slices="$num_slices" --max-restarts=20 --base-docker-image=python:3.12 \
    --script-dir="$stage" "${environment[@]}" --command="${command//\$/\$\$}" </dev/null
}

command=${1:---help}
if [[ $command == --help ]]; then
  usage
  exit
fi
need_checkout launch/gke_xpk.sh
name=gradjax cluster="" type="" num_slices=1
zone=${CLOUDSDK_COMPUTE_ZONE:-} project=${CLOUDSDK_CORE_PROJECT:-}
read_settings "name= cluster= type= num_slices= zone= project= dry_run" "${@:2}"
[[ $name =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] ||
  fail "--name=$name: expected up to 39 lower-case letters, digits and dashes, a letter first."
require cluster "name a cluster, as in --cluster=CLUSTER; xpk cluster create makes one"
require zone "name the cluster's, as in --zone=us-west4-a, or set CLOUDSDK_COMPUTE_ZONE"
require project "name the cluster's, as in --project=PROJECT, or set CLOUDSDK_CORE_PROJECT"
if [[ $command == run ]]; then
  require type "name the accelerator, as in --type=v5litepod-16"
  prepare_remote_flags
  need git "install it"
  need docker "install it; xpk builds the image of the pods with it"
fi
need xpk "install it (pip install xpk)"
need kubectl "install it (gcloud components install kubectl)"

where=(--cluster="$cluster" --zone="$zone" --project="$project")
pods=(--namespace=default --selector="jobset.sigs.k8s.io/jobset-name=$name")
stage=$root/build/launch/gke-$name
expected_state="" # what dry_run finds
case $command in
  run) submit ;;
  status)
    look
    run kubectl get pods "${pods[@]}" --output=wide </dev/null
    ;;
  logs)
    look
    run kubectl logs "${pods[@]}" --all-containers --prefix --tail=100 \
      --max-log-requests=1000 </dev/null
    ;;
  delete)
    expected_state=$name:Completed
    delete
    ;;
  *) fail "$command: expected run, status, logs or delete (see --help)." ;;
esac
