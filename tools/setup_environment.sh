#!/bin/sh
# Makes .venv and installs pinned packages into it. The Makefile runs it when a file it depends on has changed.
#
#   tools/setup_environment.sh runtime       what metatrain runs on (requirements/base.txt and the tables' flavour)
#   tools/setup_environment.sh package       metatrain itself, editable
#   tools/setup_environment.sh development   tests and linters (requirements/dev.txt, requirements/s3.txt)
#
# PYTHON=…        the Python 3.11 to use (default: python3.11, else python3 where that is 3.11)
# FBGEMM=cpu|gpu  the flavour of FBGEMM (default: gpu where the NVIDIA driver's library can be loaded, else cpu)
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }
is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }
# A quiet pip, named by its interpreter: the `pip` script of a moved folder points at the old place.
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
add() { pip install --quiet --progress-bar off --no-warn-script-location "$@"; }

find_python() {
    for candidate in ${PYTHON:-python3.11 python3}; do
        if is_311 "$candidate"; then echo "$candidate"; return; fi
    done
    fail "no Python 3.11 found (looked for: ${PYTHON:-python3.11, python3}).
  remedy: install it (Debian 12: apt-get install python3.11 python3.11-venv; anywhere: pyenv install 3.11),
          or name one: make PYTHON=/path/to/python3.11 ..."
}

make_environment() {
    if [ -e .venv ] && is_311 .venv/bin/python && pip --version >/dev/null 2>&1; then return; fi
    python=$(find_python)
    # --clear: a folder that an interrupted set-up left is of no use.
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv ||
        fail "\`$python -m venv\` failed. remedy: install its venv module (Debian: apt-get install python3.11-venv)."
}

flavour() {
    case "${FBGEMM:-}" in
        cpu | gpu) echo "$FBGEMM" ;;
        "") if .venv/bin/python -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then echo gpu; else echo cpu; fi ;;
        *) fail "FBGEMM is '$FBGEMM'. remedy: FBGEMM=cpu, FBGEMM=gpu, or leave it out." ;;
    esac
}

runtime() {
    [ "$(uname -s)" = Linux ] || fail "FBGEMM has wheels for Linux alone, this is $(uname -s). remedy: use Linux, or its container."
    make_environment
    add "$(grep '^pip==' requirements/base.txt)"
    say "installing torch, ray and what else metatrain runs on (2 to 5 minutes the first time)"
    add --requirement requirements/base.txt
    wanted=$(flavour)
    if [ "$wanted" = gpu ]; then other=fbgemm-gpu-cpu; else other=fbgemm-gpu; fi
    if pip show --quiet "$other" >/dev/null 2>&1; then
        # Both flavours own the same folder: removing one leaves the other in pieces, so both go.
        say "removing the other flavour of FBGEMM"
        pip uninstall --quiet --yes fbgemm-gpu fbgemm-gpu-cpu
    fi
    say "installing TorchRec and the $wanted flavour of FBGEMM"
    add --no-deps --requirement "requirements/tables-$wanted.txt"
}

package() {
    say "installing metatrain, editable"
    # Shown only if it fails: the build prints a warning about every editable install.
    output=$(add --no-deps --no-build-isolation --editable . 2>&1) || fail "pip could not install it:
$output"
}

development() {
    say "installing tests and linters (under a minute)"
    add --requirement requirements/dev.txt --requirement requirements/s3.txt
}

case "${1:-}" in
    runtime | package | development) "$1" ;;
    *) fail "what to set up? remedy: $0 runtime|package|development" ;;
esac
