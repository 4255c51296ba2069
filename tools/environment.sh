# Makes the Python environment of this checkout. To be sourced by bash scripts, which then use "$PYTHON".
#
#   MEGAGAP_VENV=path      use this virtual environment instead of .venv
#   MEGAGAP_PYTHON=python  use this Python's environment, which has torch (a cluster's module, say): nothing but
#                          megagap itself is installed into it
#
# Set-up runs once and again when what it depends on changes (a stamp holds a hash), or was interrupted. Several at a
# time wait for each other.

MEGAGAP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# A Python >= 3.11 that runs (a shim may stand for a version that is not there) and can make environments. 3.11 first:
# for later versions, the package index may offer a torch of several GB only.
megagap_find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "found no Python >= 3.11 with the venv module (tried python3.11, 3.12, 3.13, python3)" >&2
    echo "  install one (Debian: apt-get install python3 python3-venv), or name yours: MEGAGAP_PYTHON=/path/to/python" >&2
    return 1
}

megagap_hash() {
    (
        cd "$MEGAGAP_ROOT"
        printf '%s\n' "$MEGAGAP_ROOT" "$PYTHON" "${CXX:-}" "${MEGAGAP_BUILD:-}"
        find csrc -type f | LC_ALL=C sort | xargs cat setup.py pyproject.toml requirements.txt tools/environment.sh
    ) | sha256sum | cut -d' ' -f1
}

# What an installation depends on and what it left, as it is now; fails where megagap is not installed.
megagap_state() {
    megagap_hash
    (cd / && "$PYTHON" -c 'import importlib.metadata, importlib.util, megagap
kernels = importlib.util.find_spec("megagap._C")
print(importlib.metadata.version("torch"), megagap.__file__, kernels and kernels.origin)') 2>/dev/null
}

megagap_is_ready() {
    local state
    [ -x "$PYTHON" ] && [ -f "$STAMP" ] && state=$(megagap_state) && [ "$state" = "$(cat "$STAMP")" ]
}

megagap_install_requirements() {
    local venv=$1 base
    # Left by a set-up that was killed during installation: what is there cannot be trusted.
    # Only what was made here is deleted: MEGAGAP_VENV may name an environment with more in it.
    if [ -s "$venv/.megagap-installing" ]; then
        echo "an earlier set-up of $venv was interrupted: starting again" >&2
        rm -rf "$venv"
    fi
    if [ ! -x "$venv/bin/python" ]; then
        base=$(megagap_find_python) || return
        echo "making $venv with $base" >&2
        mkdir -p "$venv" && echo "made here" >"$venv/.megagap-installing" && "$base" -m venv "$venv" || return
    fi
    if cmp -s "$MEGAGAP_ROOT/requirements.txt" "$venv/megagap-requirements.txt"; then
        return
    fi
    touch "$venv/.megagap-installing"
    echo "installing torch and friends into $venv, about 1 GB, 1-3 minutes" >&2
    "$PYTHON" -m pip install -qq --disable-pip-version-check -r "$MEGAGAP_ROOT/requirements.txt" || return
    cp "$MEGAGAP_ROOT/requirements.txt" "$venv/megagap-requirements.txt"
    rm "$venv/.megagap-installing"
}

# What the given Python must have beforehand, as it is not ours to change.
megagap_check_given_python() {
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "MEGAGAP_PYTHON=$MEGAGAP_PYTHON is not Python 3.11 or later" >&2
        return 1
    fi
    "$PYTHON" "$MEGAGAP_ROOT/tools/missing_packages.py" "$MEGAGAP_ROOT/pyproject.toml"
}

megagap_install_package() {
    local log
    echo "building and installing megagap" >&2
    log=$(mktemp)
    if ! (cd "$MEGAGAP_ROOT" && "$PYTHON" -m pip install --verbose --disable-pip-version-check --no-deps \
        --no-build-isolation --editable .) >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm "$log"
        return 1
    fi
    grep -o 'warning: megagap is installed without.*' "$log" | head -n 1 >&2
    rm "$log"
}

megagap_set_up() {
    if command -v flock >/dev/null && exec 9>>"$MEGAGAP_ROOT/setup.py"; then
        if ! flock --nonblock 9; then
            echo "waiting for another set-up of $MEGAGAP_ROOT" >&2
            flock 9 || true
        fi
    fi
    if ! megagap_is_ready; then
        rm -f "$STAMP"
        if [ -n "${MEGAGAP_PYTHON:-}" ]; then
            megagap_check_given_python || return
        else
            megagap_install_requirements "$VENV" || return
        fi
        megagap_install_package || return
        mkdir -p "$(dirname "$STAMP")"
        megagap_state >"$STAMP.partial" && mv "$STAMP.partial" "$STAMP" || return
    fi
    exec 9>&-
}

if [ -n "${MEGAGAP_PYTHON:-}" ]; then
    PYTHON=$(command -v "$MEGAGAP_PYTHON") || {
        echo "MEGAGAP_PYTHON=$MEGAGAP_PYTHON was not found" >&2
        exit 1
    }
    STAMP=$MEGAGAP_ROOT/build/environment-$(printf %s "$PYTHON" | sha256sum | cut -c1-16).stamp
else
    VENV=${MEGAGAP_VENV:-$MEGAGAP_ROOT/.venv}
    case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
    PYTHON=$VENV/bin/python
    STAMP=$VENV/megagap.stamp
fi
if ! megagap_is_ready; then
    megagap_set_up || {
        echo "set-up failed: fix the cause, then run the same command again" >&2
        exit 1
    }
fi
