# Sourced by the two set-up commands with the extras to install: makes .venv with the pinned versions, once.
# A fingerprint of what was asked for lies in .venv, so that the second time is quick.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=…" >&2
    exit 2
fi
wanted="$(cat setup.cfg pyproject.toml scripts/constraints.txt | cksum) $("$python" --version) $PWD"
touch_file=".venv/installed${1:-}"
if [ "$(cat "$touch_file" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv, once" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c scripts/constraints.txt -e ".${1:-}" >&2
    echo "$wanted" >"$touch_file"
fi
