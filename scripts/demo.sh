#!/usr/bin/env bash
# Trains the built-in demo in .venv and writes a report: no data, no network beyond the installation, a few minutes
# on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""
exec .venv/bin/python scripts/demo.py "$@"
