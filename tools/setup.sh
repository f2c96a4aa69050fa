#!/bin/sh
# Make the virtual environment .venv with everything the main job and the tests need. Quick when nothing has changed.
#
#   sh tools/setup.sh            used by `make run`
#   sh tools/setup.sh test       used by `make test`: the browser that the report is tested in as well
#
# PYTHON=...          the interpreter to use (3.11 or newer)      ZNN_VENV=...   another place than .venv
# ZNN_TORCH=no        do without PyTorch (the comparison with it is then skipped)
set -eu
cd "$(dirname "$0")/.."
venv=${ZNN_VENV:-.venv}
extras=test,bench,cluster,data,docs
torch='torch==2.13.0+cpu'   # a local version never matches a CUDA build
torch_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

apt_install() {   # installs Debian packages where that is ours to do: as root, on a system with apt-get
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
    say "installing $*"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-} python3 python python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 && is_recent "$candidate"; then
            python=$candidate
            return
        fi
    done
    return 1
}

ensure_python() {
    find_python || { apt_install python3 python3-venv python3-dev && find_python; } ||
        fail "Python 3.11 or newer is needed, and none was found: install it (Debian 12, Ubuntu 24.04:" \
             "sudo apt-get install python3 python3-venv python3-dev) or name one with PYTHON=..."
}

can_venv() { "$python" -c 'import venv, ensurepip' 2>/dev/null; }
has_headers() { [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; }

ensure_venv_module() {
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    can_venv || { apt_install "$version-venv" && can_venv; } ||
        fail "$python cannot make virtual environments: sudo apt-get install $version-venv"
    has_headers || { apt_install "$version-dev" && has_headers; } ||
        fail "$python lacks its C headers (Python.h): sudo apt-get install $version-dev"
}

compiles() { printf '#include <atomic>\n#include <span>\nint main() {}\n' | "$1" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; }

find_compiler() {
    for candidate in ${CXX:-} c++ g++ clang++; do
        if command -v "$candidate" >/dev/null 2>&1 && compiles "$candidate"; then
            compiler=$candidate
            return
        fi
    done
    return 1
}

ensure_compiler() {
    find_compiler || { apt_install g++ && find_compiler; } ||
        fail "no compiler for C++20 was found: sudo apt-get install g++ (version 11 or newer), or name one with CXX=..."
    CXX=$compiler
    export CXX
}

changed_since() {   # whether any of the files given, or below the folders given, is newer than the stamp $1
    stamp=$1
    shift
    [ ! -f "$stamp" ] || [ -n "$(find "$@" -type f -newer "$stamp" 2>/dev/null | head -n 1)" ]
}

make_environment() {
    [ -x "$venv/bin/python" ] && is_recent "$venv/bin/python" && return
    ensure_python
    ensure_venv_module
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -qq --upgrade pip
}

# The engine is built in place (editable), in a build folder that is kept, so that a change recompiles little.
install_engine() {
    changed_since "$venv/.engine" native pyproject.toml tools/setup.sh || return 0
    python=$venv/bin/python
    has_headers || { ensure_python; ensure_venv_module; python=$venv/bin/python; }
    ensure_compiler
    tools='scikit-build-core>=0.10 pybind11>=2.13'
    command -v cmake >/dev/null 2>&1 || tools="$tools cmake>=3.20"
    command -v ninja >/dev/null 2>&1 || tools="$tools ninja"
    say "building the engine with $CXX and installing what it needs (some minutes the first time)"
    # shellcheck disable=SC2086  # several words are meant
    "$python" -m pip install -qq $tools
    PATH=$venv/bin:$PATH "$python" -m pip install -qq --no-build-isolation --editable ".[$extras]"
    touch "$venv/.engine"
}

has_torch() { "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; }

# PyTorch's CPU build, where there is one for this machine: first from where pip looks anyway, then from its own index.
install_torch() {
    [ "${ZNN_TORCH:-yes}" = no ] && return
    [ -f "$venv/.torch" ] && [ "$(cat "$venv/.torch")" = "$torch" ] && return
    if ! has_torch; then
        say "looking for $torch"
        "$venv/bin/python" -m pip install -qq --retries 1 "$torch" 2>/dev/null ||
            "$venv/bin/python" -m pip install -qq --retries 1 --timeout 20 --extra-index-url "$torch_index" "$torch" 2>/dev/null ||
            say "PyTorch's CPU build was not found: comparisons with it will be skipped (delete $venv/.torch to try again)"
    fi
    printf '%s\n' "$torch" > "$venv/.torch"
}

# What a few experiments or tests need and the rest do without: installed where that is ours to do, tried once.
ensure_program() {   # program, package, what is left out without it
    command -v "$1" >/dev/null 2>&1 || [ -f "$venv/.without-$1" ] && return
    apt_install "$2" && return
    say "$1 is not installed, so $3 (Debian, Ubuntu: sudo apt-get install $2)"
    touch "$venv/.without-$1"
}

case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
make_environment
install_engine
install_torch
ensure_program valgrind valgrind "cache misses will not be counted"
if [ "${1:-}" = test ]; then
    ensure_program chromium chromium "the report will not be opened in a browser"
fi
