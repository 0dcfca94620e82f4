# shellcheck shell=bash
# Sourced by launch/tpu_pod.sh, gke_xpk.sh, slurm.sbatch and paper.sh after environment.sh: how they
# read what they are given, and run or only show (dry_run) what they do. They define
# usage and, where something is packed, the directory stage.
# shellcheck disable=SC2154 # root is set by environment.sh, stage by them

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "this is bash $BASH_VERSION where 4.4 or newer is needed; install one (macOS: brew install bash)."

dry_run=${dry_run:-}

say() {
  if [[ ! $dry_run ]]; then echo "gradjax: $*" >&2; fi
}

# The arguments as a line that a shell reads as the same arguments.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word=${word@Q}; fi
    line+=" $word"
  done
  echo "${line# }"
}

# Runs a command; under dry_run shows it.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# need TOOL WHAT: fails if there is no such command, saying what to do.
need() {
  if [[ ! $dry_run ]] && ! command -v "$1" >/dev/null; then fail "there is no $1 on PATH; $2."; fi
}

# need_checkout SCRIPT: fails where launch/ came with an installed package.
need_checkout() {
  in_checkout || fail "$1 sends a commit of gradjax's repository to other machines, and $root is an" \
    "installed package; call it from a clone of the repository: bash CLONE/$1."
}

# require SETTING WHAT: fails if the setting is empty, saying what to give.
require() {
  [[ ${!1} ]] || fail "--$1 is not given; $2."
}

# read_settings KNOWN ARGUMENTS: sets a variable for each setting, --NAME=VALUE where KNOWN has
# NAME= and --NAME (true) where it has NAME. What follows `--` goes into the array flags. --help
# shows the help.
read_settings() {
  local known=" $1 " setting
  shift
  while (($#)) && [[ $1 != -- ]]; do
    setting=${1%%=*}
    setting=${setting#--}
    if [[ $setting == help ]]; then
      usage
      exit
    fi
    case $known in
      *" $setting= "*)
        [[ $1 == --*=?* ]] || fail "$1: expected --$setting=VALUE."
        printf -v "$setting" %s "${1#*=}"
        ;;
      *" $setting "*)
        [[ $1 == "--$setting" ]] || fail "$1: expected --$setting alone."
        printf -v "$setting" true
        ;;
      *) fail "$1 is not a setting of this script; flags of gradjax spectra come after -- (see --help)." ;;
    esac
    shift
  done
  flags=("${@:2}")
}

# Fills the array given with NAME=VALUE (or NAME) of each flag of gradjax spectra and of the flag
# files among them.
read_flags() {
  local flag line
  while (($#)); do
    flag=${1#-}
    flag=${flag#-}
    if [[ $flag != *=* && $# -gt 1 && $2 != -* ]]; then
      flag+="=$2"
      shift
    fi
    shift
    given+=("$flag")
    if [[ $flag == flagfile=* ]]; then
      [[ -f ${flag#*=} ]] || fail "--$flag: there is no such file."
      while read -r line || [[ $line ]]; do
        if [[ $line == -* ]]; then read_flags "$line"; fi
      done <"${flag#*=}"
    fi
  done
}

# Adds to flags what makes many processes one run, unless it is there. They may be started again
# at any time, so that --overwrite is refused: it would throw away what is finished.
prepare_flags() {
  local flag coordinator=--coordinator_address=auto
  given=()
  read_flags "${flags[@]}"
  for flag in "${given[@]}"; do
    if [[ $flag == coordinator_address=* ]]; then coordinator=""; fi
    if [[ $flag =~ ^overwrite(=([Tt]rue|1|[Tt]|[Yy]es|[Yy]))?$ ]]; then
      fail "--overwrite would throw finished rows away whenever the run is started again after a" \
        "preemption; delete the old --output_dir, or name another one."
    fi
  done
  if [[ $coordinator ]]; then flags=("$coordinator" "${flags[@]}"); fi
}

# Looks through the flags of a run on machines that share no disk with this one. Sets output_dir
# and files, the local files that are named, which have to be sent along.
prepare_remote_flags() {
  local flag value
  files=()
  output_dir=""
  prepare_flags
  for flag in "${given[@]}"; do
    value=${flag#*=}
    case $flag in
      output_dir=*) output_dir=$value ;;
      flagfile=*) send_along "$flag" "$value" ;;
      data=*)
        value=${value#*=}
        if [[ -e $value ]]; then
          send_along "$flag" "$value"
        elif [[ $value == *.@(json|jsonl|parquet) && $value != *://* ]]; then
          fail "--$flag: there is no file $value here."
        fi
        ;;
      model=*)
        if [[ -d $value ]]; then
          fail "--$flag: a directory of this machine, which is not sent to workers; name a Hub" \
            "repository, or put it into a bucket with gradjax convert and name it there."
        fi
        ;;
    esac
  done
  [[ $output_dir == gs://?* ]] ||
    fail "--output_dir=$output_dir: the workers' disks are lost with them; name a bucket among the" \
      "flags of gradjax spectra, as in --output_dir=gs://BUCKET/PATH."
}

# send_along FLAG PATH: a file is found under the same name on the workers.
send_along() {
  if [[ $2 == /* || /$2/ == */../* ]]; then
    fail "--$1: workers get files by their names relative to the directory that this is called" \
      "from; call it from a directory above $2, with a relative name."
  fi
  files+=("$2")
}

# Puts what workers need into the directory $stage: the committed repository and the files named.
pack() {
  if [[ ! $dry_run && $(git -C "$root" status --porcelain) ]]; then
    say "workers get the last commit of $root, without what has changed since"
  fi
  run mkdir -p "$stage" &&
    run git -C "$root" archive --output="$stage/code.tar.gz" HEAD &&
    run tar -czhf "$stage/files.tar.gz" -T /dev/null -- "${files[@]}"
}

# Run by workers where these two files are. The environment that lies beside them stays.
# shellcheck disable=SC2034
unpack="rm -rf code files && mkdir code files &&\
 tar -xzf code.tar.gz -C code && tar -xzf files.tar.gz -C files"
