#!/usr/bin/env bash
# Run the test suite in a fresh virtual environment for each Python version.
#
#   tests/run_matrix.sh                 # those of 3.11 3.12 3.13 found here
#   tests/run_matrix.sh 3.11 3.12       # these
#   tests/run_matrix.sh /opt/py/bin/python3.13
#
# Environment:
#   TORCH_VERSION    torch version to install (default: the newest)
#   TORCH_PIP_ARGS   extra pip arguments for torch, for instance
#                    "--index-url https://download.pytorch.org/whl/cpu"
#   PIP_CONSTRAINT   read by pip itself: with .ci/constraints-oldest.txt
#                    the oldest supported dependencies are tested
#
# Exits non-zero when a row failed.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
# pip reads PIP_CONSTRAINT relative to the working directory: make it absolute.
if [ -f "${PIP_CONSTRAINT:-}" ]; then
    PIP_CONSTRAINT=$(realpath "$PIP_CONSTRAINT")
    export PIP_CONSTRAINT
fi
cd "$root" || exit 2
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

# Print the interpreter for "3.12" or a path; fail when there is none that runs.
find_python() {
    local name=$1 candidate
    [[ $name == */* ]] || name=python$name
    for candidate in "$name" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import venv' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# Make the environment $2 with the interpreter $1, install and test.
# The word left in $tmp/stage says how far it came.
run_one() {
    local python=$1 venv=$2
    echo "venv failed" >"$tmp/stage"
    "$python" -m venv "$venv" || return 1
    PATH=$venv/bin:$PATH
    echo "torch install failed" >"$tmp/stage"
    # shellcheck disable=SC2086  # TORCH_PIP_ARGS is a list of words
    python -m pip install -q ${TORCH_PIP_ARGS:-} "torch${TORCH_VERSION:+==$TORCH_VERSION}" || return 1
    echo "install failed" >"$tmp/stage"
    python -m pip install -q '.[test]' || return 1
    echo "tests failed" >"$tmp/stage"
    pytest -q -m "" tests || return 1
    echo "passed" >"$tmp/stage"
}

versions=("$@")
[ $# -gt 0 ] || versions=(3.11 3.12 3.13)
rows=()
status=0
for name in "${versions[@]}"; do
    if ! python=$(find_python "$name"); then
        if [ $# -gt 0 ]; then
            rows+=("$name|-|not found")
            status=1
        fi
        continue
    fi
    echo "== $name"
    (run_one "$python" "$tmp/venv") || status=1
    torch=$("$tmp/venv/bin/python" -c 'import torch; print(torch.__version__)' 2>/dev/null)
    version=$("$python" -c 'import platform; print(platform.python_version())')
    rows+=("$version|${torch:--}|$(cat "$tmp/stage")")
    rm -rf "$tmp/venv"
done

if [ ${#rows[@]} -eq 0 ]; then
    echo "none of these Pythons was found: ${versions[*]}" >&2
    exit 1
fi
echo
format='%-26s %-16s %s\n'
# shellcheck disable=SC2059
printf "$format" python torch result
for row in "${rows[@]}"; do
    IFS='|' read -r version torch result <<<"$row"
    # shellcheck disable=SC2059
    printf "$format" "$version" "$torch" "$result"
done
exit $status
