#!/usr/bin/env bash
# Makes .venv ready, once: chooses the CPU or the CUDA lock by what the machine has, installs it, and stamps it with the
# lock's digest, so that a second call does nothing. Every failure ends with one clear line.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "windlass set-up: $*" >&2; exit 1; }

kind=cpu
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then kind=cuda; fi
lock=requirements/$kind.lock
stamp=$(cat "$lock" setup.cfg requirements/bootstrap.sh | sha256sum | cut -d' ' -f1)
[ -f .venv/windlass-stamp ] && [ "$(cat .venv/windlass-stamp)" = "$stamp" ] && exit 0

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
            python=$candidate; break
        fi
    done
fi
[ -n "$python" ] || fail "Python 3.11 is needed, found $(python3 --version 2>&1 || echo none); set PYTHON to one"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 ||
    fail "PYTHON=$python is not Python 3.11: $("$python" --version 2>&1 || true)"
"$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || fail "$python lacks the venv module (Debian: python3.11-venv)"
for tool in gcc g++; do
    command -v "$tool" >/dev/null 2>&1 || fail "no $tool on the path; torch and DeepSpeed build extensions with it (Debian: build-essential)"
done
need_gib=$([ "$kind" = cuda ] && echo 20 || echo 7)
free_gib=$(df -Pk . | awk 'NR==2 {print int($4/1048576)}')
[ "$free_gib" -ge "$need_gib" ] || fail "$need_gib GiB of disk are needed here, $free_gib GiB are free"

echo "windlass set-up: installing $lock into .venv (a few minutes, once)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
[ -x .venv/bin/python ] && .venv/bin/python -c '' >/dev/null 2>&1 || "$python" -m venv --clear .venv ||
    fail "could not create .venv with $python"
rm -f .venv/windlass-stamp
pip=(.venv/bin/python -m pip --disable-pip-version-check -q install --no-deps)

last_line() { grep -E 'ERROR|error' "$log" | tail -n 1 | cut -c1-300; }

# torch alone first: the CPU build lies on the machine, in a configured index, or in PyTorch's own.
awk '/^torch==/ {on=1; print; next} /^[^ ]/ {on=0} on' "$lock" >"$log.torch"
if ! "${pip[@]}" --require-hashes -r "$log.torch" >"$log" 2>&1; then
    if [ "$kind" = cpu ]; then
        echo "windlass set-up: no CPU build of torch in the configured sources; trying PyTorch's own index"
        timeout 900 "${pip[@]}" --timeout 20 --retries 1 --index-url https://download.pytorch.org/whl/cpu \
            --require-hashes -r "$log.torch" >"$log" 2>&1 ||
            fail "no CPU build of $(head -n1 "$log.torch" | cut -d' ' -f1): not in the configured sources, and PyTorch's index cannot be reached"
    else
        fail "could not install $(head -n1 "$log.torch" | cut -d' ' -f1): $(last_line)"
    fi
fi
rm -f "$log.torch"
"${pip[@]}" --require-hashes -r "$lock" >"$log" 2>&1 ||
    fail "could not install $lock (is a package index reachable?): $(last_line)"
"${pip[@]}" --no-build-isolation -e . >"$log" 2>&1 || fail "could not install windlass itself: $(last_line)"
echo "$stamp" >.venv/windlass-stamp
echo "windlass set-up: done"
