# shellcheck shell=bash
# Sourced by the other scripts of launch/, by tests/run.sh and .ci/run: finds a Python and keeps an
# environment, in which gradjax is installed as it stands in this checkout (pip install -e).
#
#   PYTHON  the interpreter that makes the environment (default: the first that will do)
#   VENV    where the environment lies (default: .venv in the repository)
#
# Where launch/ came with an installed package, that package's environment is used as it is.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

in_checkout() {
  [[ -e $root/pyproject.toml ]]
}

if in_checkout; then
  VENV=${VENV:-$root/.venv}
  [[ $VENV == /* ]] || VENV=$PWD/$VENV
else
  VENV=$(cd "$root/../../../.." && pwd) # of VENV/lib/python3.X/site-packages/gradjax
fi

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

# What the requirements file $1 asks for: this checkout, what pyproject.toml lists, and more.
wanted() {
  echo "$root"
  cat "$root/pyproject.toml" "$root/$1"
}

# Whether $VENV has what the requirements file $1 asks for: a copy is kept beside what it installed.
up_to_date() {
  [[ -x $VENV/bin/python ]] && wanted "$1" | cmp -s - "$VENV/installed-$1"
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
  # pip reads the . of -e . from where it runs.
  (cd "$root" && "$VENV/bin/python" -m pip install -r "$1") 2>&1 |
    tee "$running" | follow || status=$?
  mv "$running" "$log"
  if ((status)); then
    grep -v '^WARNING' "$log" | tail -n 20 >&2
    fail "pip could not install $1; its whole output is in $log."
  fi
  wanted "$1" >"$VENV/installed-$1"
}

# ensure_environment FILE: $VENV has what the requirements file FILE lists. Two callers take turns.
ensure_environment() {
  ! in_checkout || up_to_date "$1" || (
    flock 9 2>/dev/null || true # not everywhere
    up_to_date "$1" || install "$1"
  ) 9<"$root/pyproject.toml"
}
