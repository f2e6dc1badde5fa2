#!/usr/bin/env bash
# The whole suite in .venv: lint, format, tests on all cores, benchmarks as tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh "[test]"
unset PYTHONDONTWRITEBYTECODE  # many tests start processes, each of which would compile its libraries anew
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-logo --no-cache
[ $# -gt 0 ] || set -- tests benchmarks --benchmark-disable
# One more than there are cores: many tests wait for processes of their own.
exec .venv/bin/python -m pytest --numprocesses $(($(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal "$@"
