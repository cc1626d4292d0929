#!/usr/bin/env bash
# All tests, in the same environment as the quick start. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
source launch/env.sh
set_up
say "testing"
python -m pytest --durations=15 "$@"
