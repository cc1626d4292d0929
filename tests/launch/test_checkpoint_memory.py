"""What a checkpoint costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.covering import some
from tests.launch.conftest import REPO, environment

pytestmark = pytest.mark.slow

SLACK = 256 << 20


@pytest.mark.timeout(400)
@pytest.mark.parametrize("millions", some([60, 130, 350], [60]))
def test_peak_memory_of_a_checkpoint(millions, tmp_path):
    """At most the state and 256 MiB beyond what is there; a save in the foreground needs no copy of the state."""
    command = [
        sys.executable,
        "-m",
        "lorapre_dist.bench",
        "checkpoint",
        "--model",
        f"llama-{millions}m",
        "--rank",
        "128",
    ]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    command += ["--phases", "save", "background save", "consolidate"]
    subprocess.run(command, env=environment(), cwd=REPO, check=True, timeout=380)
    found = json.loads((tmp_path / "out.json").read_text())
    state = found["save"]["state"]
    assert state > max(3e6 * millions, 1.5 * SLACK)  # a copy of it would show
    assert found["save"]["peak"] <= SLACK
    assert found["background save"]["peak"] <= state + SLACK
    assert found["consolidate"]["peak"] <= SLACK
