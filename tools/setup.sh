#!/bin/sh
# Create .venv if needed and install vitq into it, editable, with its development tools.
# Needs Python >= 3.10 only: uv is taken from the PATH, or else installed into .venv with pip.
# Called by the Makefile from the top of the repository; run again, it changes nothing.
set -eu

python=${PYTHON:-python3}
venv_python=.venv/bin/python

fail() {
    echo "setup: $*" >&2
    exit 1
}

works() {
    "$@" >/dev/null 2>&1
}

check_version() {
    works "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$1 is $("$1" --version 2>&1); vitq needs Python >= 3.10. $2"
}

uv=
if works uv --version; then uv=uv; fi

if works "$venv_python" -c ''; then
    check_version "$venv_python" "Delete .venv and run make again with PYTHON=python3.12 (or another that you have)."
else
    works "$python" -c '' ||
        fail "cannot run '$python'. Install Python >= 3.10, or name one: make PYTHON=python3.12 …"
    check_version "$python" "Name a newer one: make PYTHON=python3.12 …"
    without_pip=
    if [ -n "$uv" ]; then
        without_pip=--without-pip
    elif ! works "$python" -c 'import ensurepip'; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$python has no 'ensurepip', so it cannot create a virtual environment." \
            "On Debian or Ubuntu install it with: sudo apt-get install python$version-venv"
    fi
    echo "setup: creating .venv with $("$python" --version 2>&1)"
    "$python" -m venv --clear $without_pip .venv
fi

if [ -z "$uv" ]; then
    uv=.venv/bin/uv
    if ! works "$uv" --version; then
        echo "setup: installing uv into .venv"
        works "$venv_python" -m pip --version || "$venv_python" -m ensurepip >/dev/null ||
            fail "pip is missing in .venv and cannot be added. Delete .venv and run make again."
        "$venv_python" -m pip install --quiet --disable-pip-version-check uv
    fi
fi

echo "setup: installing vitq and its development tools (the first time this fetches about 5 GB)"
# The largest package is over 1 GB; uv's 30 s without an answer is short for that.
UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-600} "$uv" pip install --python "$venv_python" -e '.[dev]'
