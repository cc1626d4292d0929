#!/usr/bin/env bash
# All tests, in the same environment as the quick start, two files at a time. Arguments go to pytest:
#
#   --fast          what a change should pass before all is run: under 3 minutes
#   --exhaustive    every case, and what is long
#   --coverage      also count the lines that the tests reach, in this process and all that it forks or starts
#   -n 8            more files at a time; -n 0: one after the other
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
set_up
unset PYTHONDONTWRITEBYTECODE  # each process that a test starts would compile our sources again
options=()
for given in "$@"; do
    if [ "$given" = --coverage ]; then
        options+=(--cov=lorapre_dist --cov-report=term)
    else
        options+=("$given")
    fi
done
say "testing"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 ${options[@]+"${options[@]}"}
