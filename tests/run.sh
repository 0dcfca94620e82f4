#!/usr/bin/env bash
# Checks the code and runs the tests, on all cores:
# bash tests/run.sh [--all] [pytest arguments]
#
#   --all  also the tests marked slow, as CI does
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

say() {
  echo "tests: $* ($SECONDS s)"
}

# Runs a command; what it says is shown only if it fails.
quietly() {
  local said
  said=$("$@" 2>&1) || {
    echo "$said"
    return 1
  }
}

marked="not slow"
if [[ ${1:-} == --all ]]; then
  marked=""
  shift
fi

say "installing what $VENV lacks"
ensure_environment requirements-test.txt
cd "$root"
python=$VENV/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say "ruff"
"$python" -m ruff check
"$python" -m ruff format --check
say "imports"
quietly "$VENV/bin/lint-imports" --no-cache
say "types and documentation"
quietly "$python" -m pyright --pythonpath "$python" &
if [[ -e mkdocs.yml ]]; then
  quietly "$python" -m mkdocs build --strict --quiet --site-dir "$scratch"
fi
wait $!
say "pytest"
"$python" -m pytest --numprocesses logical --dist worksteal -m "$marked" "$@"
