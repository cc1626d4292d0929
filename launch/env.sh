# Sourced by the other scripts: a virtual environment with everything the project needs, and settings for CPU ranks.
#
#   LORAPRE_VENV    virtual environment (default: .venv in the repository)
#   LORAPRE_CACHE   tokenised text, tokenizers, compiled DeepSpeed ops (default: .cache in the repository)
#   PYTHON          interpreter that the environment is made from (default: python3)

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${LORAPRE_VENV:-$REPO/.venv}"
export LORAPRE_CACHE="${LORAPRE_CACHE:-$REPO/.cache}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$LORAPRE_CACHE/torch_extensions}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

make_venv() {
    [ -x "$VENV/bin/python" ] && return
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || fail "$python not found; set PYTHON to Python 3.10 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than Python 3.10"
    say "making a virtual environment in $VENV"
    "$python" -m venv "$VENV" || fail "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
}

install_project() {
    # The stamp names what was installed, so that a second run installs nothing.
    local stamp="$VENV/.lorapre-installed" wanted
    wanted="$(cat "$REPO/constraints.txt" "$REPO/setup.py" | cksum) $REPO"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    say "installing (torch first: DeepSpeed's build looks at it)"
    local pip=("$VENV/bin/python" -m pip install --quiet -c "$REPO/constraints.txt")
    "${pip[@]}" setuptools wheel ninja
    "${pip[@]}" torch
    "${pip[@]}" --no-build-isolation deepspeed
    "${pip[@]}" --no-build-isolation -e "$REPO[test,docs]"
    printf '%s' "$wanted" >"$stamp"
}

build_ops() {
    # Without an accelerator DeepSpeed compiles a small op on first use, and a build that was killed leaves a lock on
    # which every later process waits for ever. So: build once, in one process, before any rank starts.
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.cuda.is_available())' || return 0
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    exec 9>"$TORCH_EXTENSIONS_DIR/.building"
    flock 9
    if [ -f "$TORCH_EXTENSIONS_DIR/.built" ]; then
        # Loading takes the lock for a second or two; an older one is a killed process's.
        find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +1 -delete
    else
        command -v g++ >/dev/null || fail "g++ not found; DeepSpeed compiles a small CPU op (apt-get install g++)"
        say "compiling DeepSpeed's CPU op (1 to 4 minutes, once)"
        find "$TORCH_EXTENSIONS_DIR" -name lock -delete
        PATH="$VENV/bin:$PATH" "$VENV/bin/python" -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' \
            >"$TORCH_EXTENSIONS_DIR/build.log" 2>&1 || { cat "$TORCH_EXTENSIONS_DIR/build.log" >&2; fail "the build failed"; }
        touch "$TORCH_EXTENSIONS_DIR/.built"
    fi
    exec 9>&-
}

free_port() {
    "$VENV/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

set_up() {
    make_venv
    install_project
    export PATH="$VENV/bin:$PATH"
    build_ops
}
