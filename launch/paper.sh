#!/usr/bin/env bash
# Runs the paper's experiments again: bash launch/paper.sh --table=N [-- flags of gradjax spectra]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

usage() {
  cat <<'END'
Runs experiments of the paper (arXiv 2504.10766) again, on this machine.

  bash launch/paper.sh --table=N [settings] [-- flags of gradjax spectra]

  --table=N                 those of one table, 1 to 60
  --figure=families         the nine models side by side, on the reasoning data (the paper's other
                            figures are drawn by the tables' reports, see below)
  --all                     every one, then --summary
  --summary                 one table and one page of all experiments that have run
  --output_dir=runs/paper   where samples, scores, selections, runs and reports go
  --target_tokens=auto      length of the runs at equal length: a number of response tokens, or auto,
                            the largest that 90 % of the rows of each group have
  --allow_missing           goes on where the judge has left rows without an answer
  --dry_run                 shows the commands, runs none

  bash launch/paper.sh --table=5 -- --batch_tokens=16384

configs/paper.csv says what the experiments are. Each is a sample of a data set (of rows that plain
text can hold, so of one turn), its scores, the highest and lowest rows, their spectra, those of
equally long beginnings of the responses, and a report beside the numbers that the table prints.
What several experiments share is made once. When the same command is given again, what is finished
stays and the rest goes on. A step that ended with an error is not finished, as scores are not while
rows lack an answer: the same command asks for these again.

The report of table N is RUN/report_table_N, with the odd number of tables 5 to 60, which come in
pairs; the summary is in OUTPUT_DIR/summary. Its verdicts are adjusted over all experiments.

The paper's other figures show a model layer by layer on one data set: the report of the
experiment draws them beside its table. So run the tables 5 to 12 for the figures of qwen2.5_1.5b,
13 to 20 qwen2.5_3b, 21 to 28 qwen2.5_7b (1 to 4 as well), 29 to 36 llama3.1_8b, 37 to 44
llama3.2_1b, 45 to 52 llama3.2_3b, 53 to 60 gemma2_2b; each eight are two of WizardLM, of
OpenHermes 2.5, of Magpie and of the reasoning data, in this order.

InsTag and difficulty are asked of gpt-4o: JUDGE_BASE_URL names the endpoint and costs money
(https://api.openai.com/v1). A data set that has to be fetched by hand is taken from
OUTPUT_DIR/data/NAME.jsonl, where this puts it (--sample=10000 for one that is scored):

  gradjax prepare --dataset=NAME --source=FILE --sample=200 --seed=0 --plain \
    --output=OUTPUT_DIR/data/NAME.jsonl
END
}

# Where the judge is, while nobody has said.
judge_unset="\$JUDGE_BASE_URL"

# step OUTPUT COMMAND...: makes OUTPUT, unless the same command has made it since all of $inputs.
# Where gradjax is installed makes no other command, nor at which endpoint the judge was: what it has
# answered at one stays, also where the next call names another.
# shellcheck disable=SC2154 # dry_run is set by cluster.sh
step() {
  local output=$1 stamp=$1.done words=("${@:3}") input line stale=""
  shift
  if [[ ${seen[$output]:-} ]]; then return; fi
  seen[$output]=1
  line=$(quoted "${words[@]/#--judge_base_url=*/--judge_base_url}")
  if [[ $dry_run || ! -e $output || ! -e $stamp || $(<"$stamp") != "$line" ]]; then stale=true; fi
  for input in "${inputs[@]}"; do
    if [[ $input -nt $stamp ]]; then stale=true; fi
  done
  if [[ ! $stale ]]; then
    say "$output is there"
    return
  fi
  if [[ ! $dry_run && $* == *"$judge_unset"* ]]; then
    fail "JUDGE_BASE_URL is not set; for $output gpt-4o is asked at an OpenAI-compatible endpoint," \
      "as in JUDGE_BASE_URL=https://api.openai.com/v1."
  fi
  # Whatever ends the command early, no stamp of an earlier one vouches for what it leaves.
  if [[ ! $dry_run && -e $stamp ]]; then : >"$stamp"; fi
  run "$@" </dev/null || exit
  if [[ ! $dry_run ]]; then echo "$line" >"$stamp"; fi
}

# finished OUTPUT: whether its step has come to its end, now or before.
finished() {
  [[ ${seen[$1]:-} || -s $1.done ]]
}

# program NAME FLAGS...: sets command, which runs gradjax NAME.
program() {
  command=("$VENV/bin/gradjax" "$@")
}

# prepare NAME ROWS: sets file, that many rows of a registered data set in plain text.
prepare() {
  local lines
  file=$output_dir/data/$1.jsonl
  inputs=()
  program prepare --dataset="$1" --sample="$2" --seed=0 --plain --output="$file"
  # The checksum of a whole file comes last. One that is newer than the stamp was made by hand.
  if [[ $dry_run || ! -e $file || ! $file.sha256 -nt $file.done ]]; then
    step "$file" "${command[@]}"
  else
    lines=$(wc -l <"$file")
    ((lines <= $2)) || fail "$file has $((lines)) rows where the paper draws $2; draw them from what" \
      "was fetched by hand: $(quoted "$VENV/bin/gradjax") prepare --dataset=$1 --source=FILE" \
      "--sample=$2 --seed=0 --plain $(quoted "--output=$file")"
  fi
  inputs=("$file.sha256")
}

# select_rows NAME: sets selection, where the highest and lowest rows of a data set by $metric are.
select_rows() {
  local by=${metric%%_*} scores=$output_dir/scores/$1_$metric settings=()
  selection=$output_dir/selections/$1_$metric
  case $metric in
    ifd_gpt2) settings=(--ifd_model=gpt2) ;;
    ifd_qwen7b) settings=(--ifd_model=qwen2.5_7b) ;;
    reward) settings=(--reward_model=sfairXC/FsfairX-LLaMA3-RM-v0.1) ;;
    instag | difficulty)
      settings=("--judge_base_url=${JUDGE_BASE_URL:-$judge_unset}" --judge_model=gpt-4o
        ${allow_missing:+--allow_missing})
      ;;
    *) fail "configs/paper.csv has the metric $metric, which this script does not know." ;;
  esac
  prepare "$1" 10000
  program score --data="$1=$file" --metrics="$by" "${settings[@]}" --output_dir="$scores"
  step "$scores" "${command[@]}"
  inputs=("$scores.done")
  program select --scores="$scores" --by="$by" --top="$rows" --bottom="$rows" \
    --output_dir="$selection"
  step "$selection" "${command[@]}"
  inputs=("$selection.done")
}

# group NAME or NAME:top or NAME:bottom: sets file, a sample or the selected rows of one.
group() {
  case $1 in
    *:top)
      select_rows "${1%:*}"
      file=$selection/high.jsonl
      ;;
    *:bottom)
      select_rows "${1%:*}"
      file=$selection/low.jsonl
      ;;
    *) prepare "$1" "$rows" ;;
  esac
}

# name_runs: sets spectra and equal_length, an experiment's run and that at equal length.
name_runs() {
  spectra=$output_dir/runs/${model}_${dataset}_$metric
  equal_length=${spectra}_${target_tokens}_tokens
}

# measure: makes both runs of $model on the groups $high and $low.
measure() {
  local data made=()
  group "$high"
  data=(--data="high=$file")
  made+=("${inputs[@]}")
  group "$low"
  data+=(--data="low=$file")
  inputs+=("${made[@]}")
  name_runs
  program spectra --flagfile="$root/configs/$model.flags" "${data[@]}" --output_dir="$spectra" \
    "${flags[@]}"
  step "$spectra" "${command[@]}"
  program spectra --flagfile="$root/configs/$model.flags" "${data[@]}" \
    --output_dir="$equal_length" "${flags[@]}" --target_tokens="$target_tokens"
  step "$equal_length" "${command[@]}"
  inputs=("$spectra.done" "$equal_length.done")
}

# recipe KIND NUMBER: a table's experiments with a report each, a figure's with one of all.
recipe() {
  local experiment kind number model dataset metric high low rows table runs=() made=()
  for experiment in "${experiments[@]}"; do
    IFS=, read -r kind number model dataset metric high low rows <<<"$experiment"
    if [[ $kind,$number != "$1,$2" ]]; then continue; fi
    measure
    runs+=(--run="$spectra" --equal_length_run="$equal_length")
    made+=("${inputs[@]}")
    if [[ $kind == table ]]; then
      # From table 5 on, spectra have an odd number and their similarities the next one.
      table=$((number > 4 && number % 2 == 0 ? number - 1 : number))
      program report --run="$spectra" --equal_length_run="$equal_length" --compare=high:low \
        --published="$dataset/$metric:$table" --output_dir="$spectra/report_table_$table"
      step "$spectra/report_table_$table" "${command[@]}"
    fi
  done
  if [[ $1 == figure ]]; then
    inputs=("${made[@]}")
    program report "${runs[@]}" --compare=high:low --output_dir="$output_dir/figures/$2"
    step "$output_dir/figures/$2" "${command[@]}"
  fi
}

# sum_up: one report of all experiments that have run.
sum_up() {
  local experiment model dataset metric runs=()
  local -A named=()
  inputs=()
  for experiment in "${experiments[@]}"; do
    IFS=, read -r _ _ model dataset metric _ <<<"$experiment"
    name_runs
    if [[ ! ${named[$spectra]:-} ]] && finished "$spectra" && finished "$equal_length"; then
      named[$spectra]=1
      runs+=(--run="$spectra" --equal_length_run="$equal_length")
      inputs+=("$spectra.done" "$equal_length.done")
    fi
  done
  ((${#runs[@]})) || fail "--summary: no experiment has run in --output_dir=$output_dir with" \
    "--target_tokens=$target_tokens; give --table=N, --figure=NAME or --all first."
  program report --summary "${runs[@]}" --compare=high:low --output_dir="$output_dir/summary"
  step "$output_dir/summary" "${command[@]}"
}

# choose KIND NUMBER: leaves one of $recipes.
choose() {
  local one
  for one in "${recipes[@]}"; do
    if [[ $one == "$1,$2" ]]; then
      recipes=("$one")
      return
    fi
  done
  fail "--$1=$2: configs/paper.csv has no such $1; it has tables 1 to 60, one at a time, and the" \
    "figure families (the paper's other figures are drawn by the reports of the tables, see --help)."
}

table="" figure="" all="" summary="" allow_missing="" output_dir=runs/paper target_tokens=auto
read_settings "table= figure= all summary allow_missing dry_run output_dir= target_tokens=" "$@"
output_dir=${output_dir/#\~\//"$HOME/"} # a shell leaves the ~ of --output_dir=~/x as it is
mapfile -t experiments < <(tail -n +2 "$root/configs/paper.csv")
mapfile -t recipes < <(printf '%s\n' "${experiments[@]}" | cut -d, -f1,2 | uniq)
case ${table:+table}${figure:+figure}${all:+all}${summary:+summary} in
  table) choose table "$table" ;;
  figure) choose figure "$figure" ;;
  all) summary=true ;;
  summary) recipes=() ;;
  *) fail "give one of --table=N, --figure=NAME, --all and --summary (see --help)." ;;
esac
[[ $target_tokens =~ ^(auto|[1-9][0-9]*)$ ]] ||
  fail "--target_tokens=$target_tokens: expected a number of at least 1, or auto."
if [[ ! $dry_run ]]; then
  ensure_environment requirements.txt
  mkdir -p "$output_dir"/{data,scores,selections,runs,figures}
fi
declare -A seen=()
for one in "${recipes[@]}"; do recipe "${one%,*}" "${one#*,}"; done
if [[ $summary ]]; then sum_up; fi
