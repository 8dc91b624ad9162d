#!/bin/sh
# mypy and import-linter see packages only under their import names, so both run on a tree of links.
# usage: tests/lint.sh FOLDER-OF-THE-PROGRAMS FOLDER-OF-THE-TREE
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$1" && pwd)
rm -rf "$2" && mkdir -p "$2/patchmill" && cd "$2"
ln -s "$top"/engine/* patchmill/
for name in kernels benchmarks configs; do ln -s "$top/$name" "patchmill/$name"; done
"$bin/mypy" --config-file "$top/pyproject.toml" --cache-dir "$top/.mypy_cache" -p patchmill
PYTHONPATH=. "$bin/lint-imports" --config "$top/pyproject.toml" --no-cache
