# shellcheck shell=bash
# Sourced by launch/local.sh, tests/run.sh and .ci/run: finds a Python and keeps an environment.
#
#   PYTHON  the interpreter that makes the environment (default: the first that will do)
#   VENV    where the environment lies (default: .venv in the repository)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$root/.venv}

fail() {
  echo "gradjax: $*" >&2
  exit 1
}

# Whether a Python can run gradjax and make environments.
usable_python() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' &>/dev/null
}

# First usable Python among the names given, on PATH or installed by pyenv (whose commands on
# PATH work only for the version that is switched on).
find_python() {
  local name candidate
  for name in "$@"; do
    for candidate in "$name" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$name"; do
      if usable_python "$candidate"; then
        echo "$candidate"
        return
      fi
    done
  done
  return 1
}

# The Python that makes environments: $PYTHON, or the first found, 3.11 before others because the
# whole test suite runs on it.
choose_python() {
  local name found=""
  set -- python3.11 python3.12 python3.13 python3
  if [[ -n ${PYTHON:-} ]]; then set -- "$PYTHON"; fi
  find_python "$@" && return
  for name in "$@"; do
    found+="${found:+, }$name ($("$name" --version 2>/dev/null || echo "does not run"))"
  done
  fail "found $found where Python 3.11 or newer with its venv module is needed; install it (on" \
    "Debian and Ubuntu: python3-venv) or name it: PYTHON=/path/to/python3."
}

# The lines of pip as one line that changes, where someone is watching; in a log, one of them every
# 20 seconds.
follow() {
  local line said=$SECONDS
  while IFS= read -r line; do
    if [[ -t 2 ]]; then
      printf '\r\033[K%.79s' "$line" >&2
    elif ((SECONDS - said >= 20)); then
      printf 'gradjax: %.70s\n' "$line" >&2
      said=$SECONDS
    fi
  done
  if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

# Whether $VENV has what the requirements file $1 lists: a copy is kept beside what it installed.
up_to_date() {
  [[ -x $VENV/bin/python ]] &&
    cat "$root/requirements.txt" "$root/$1" | cmp -s - "$VENV/installed-$1"
}

# Installs the requirements file $1 in $VENV, which is made if there is none, or again if an
# installation was interrupted: only then is its log still called installing.log.
install() {
  local running=$VENV/installing.log log=$VENV/install.log python status=0
  if [[ -e $running ]] || ! usable_python "$VENV/bin/python" ||
    ! "$VENV/bin/python" -m pip --version &>/dev/null; then
    python=$(choose_python)
    echo "gradjax: making $VENV with $python" >&2
    "$python" -m venv --clear "$VENV"
  fi
  echo "gradjax: installing $1 (a few minutes, once)" >&2
  "$VENV/bin/python" -m pip install -r "$root/$1" 2>&1 | tee "$running" | follow || status=$?
  mv "$running" "$log"
  if ((status)); then
    grep -v '^WARNING' "$log" | tail -n 20 >&2
    fail "pip could not install $1; its whole output is in $log."
  fi
  cat "$root/requirements.txt" "$root/$1" >"$VENV/installed-$1"
}

# ensure_environment FILE: $VENV has what the requirements file FILE lists. Two callers take turns.
ensure_environment() {
  up_to_date "$1" || (
    flock 9 2>/dev/null || true # not everywhere
    up_to_date "$1" || install "$1"
  ) 9<"$root/requirements.txt"
}
