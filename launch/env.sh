# Sourced by the other scripts: makes .venv with this project and everything it needs, and activates it.
# Safe to source again: it installs only when pyproject.toml or the Python version changed since.
# OBCACHE_PYTHON names the interpreter to make it with (default: the first Python >= 3.11 found).

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPOSITORY/.venv"

find_python() {
    local candidate
    for candidate in ${OBCACHE_PYTHON:-python3 python3.11 python3.12 python3.13 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python >= 3.11 found (tried: ${OBCACHE_PYTHON:-python3, python3.11 to 3.13, python})." >&2
    echo "Install one, or name it: OBCACHE_PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# uv unpacks in parallel: 40 seconds where pip takes 7 minutes. It does not read pip's configuration, so where it cannot
# reach an index, pip installs. Its cache is beside the packages (same disk: files are linked, not copied) and goes afterwards.
install_packages() {
    local wanted="$REPOSITORY[dev]" status=1
    if "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "uv>=0.9"; then
        UV_CACHE_DIR="$VENV/.uv-cache" "$VENV/bin/uv" pip install --system-certs --python "$VENV/bin/python" --editable "$wanted"
        status=$?
        rm -rf "$VENV/.uv-cache"
    fi
    if ((status != 0)); then
        echo "environment: uv could not install; pip does (5 to 10 minutes)"
        # --no-compile: Python compiles what is imported when it is first imported, a small part of what is installed.
        "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --no-compile --editable "$wanted"
    fi
}

install_environment() {
    local stamp="$VENV/.installed-for" python wanted
    if [[ -x "$VENV/bin/python" ]]; then
        python="$VENV/bin/python"
    else
        python="$(find_python)" || return 1
    fi
    wanted="$("$python" --version) $(sha256sum <"$REPOSITORY/pyproject.toml")"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "environment: installing SGLang and this project into $VENV (11 GB; about a minute on a fast line)"
    # Without the stamp, an install that is interrupted here starts again next time.
    rm -f "$stamp"
    "$python" -m venv "$VENV" || return 1
    install_packages || return 1
    echo "$wanted" >"$stamp"
    echo "environment: ready in $VENV"
}

install_environment || exit 1
# Compiled modules must be kept: a server is three processes, and each start would compile SGLang again, for a minute or more.
unset PYTHONDONTWRITEBYTECODE
# Threads of a test or client that wait by spinning starve the server's (see obcache_sglang/cpu/platform.py).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# shellcheck disable=SC1091
source "$VENV/bin/activate"
cd "$REPOSITORY"
