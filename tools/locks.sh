#!/usr/bin/env bash
# locks.sh: writes the lock files requirements/*.txt, with the newest versions that
# requirements/*.in and python/pyproject.toml allow: for every supported Python, operating system and
# processor (by markers), with the hash of each file. Packages of several lock files have one version.
set -euo pipefail
cd "$(dirname "$0")/../requirements"
uv=${UV:-../.venv/bin/uv}
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' ../python/pyproject.toml)
lock() {  # lock NAME INPUT...
  local name=$1
  shift
  "$uv" pip compile --quiet --universal --upgrade --python-version "$oldest" --generate-hashes \
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make locks" \
    --output-file "$name.txt" "$@"
  echo "requirements/$name.txt: $(grep -c '^[a-z]' "$name.txt") packages"
}
lock run ../python/pyproject.toml run.in --all-extras
lock build build.in --constraints run.txt
lock dev dev.in --constraints run.txt --constraints build.txt
lock docs docs.in --constraints run.txt --constraints build.txt --constraints dev.txt
oldest=3.11  # the least that all of them declare; their code is not run
lock data data.in --no-deps
oldest=3.14.2
lock data-sources data-sources.in --no-deps
