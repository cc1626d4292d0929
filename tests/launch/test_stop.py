"""What a scheduler or a full disk does to a run on one host: it ends, or goes on, resumable."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.forks import Ranks
from tests.launch.conftest import ds_json, finish, group_members, launch, wait_for
from tests.launch.test_resume import rows

pytestmark = pytest.mark.slow

STEPS = ["--max_steps", "40", "--warmup_steps", "3", "--eval_every", "10", "--save_every", "5", "--keep_last", "2"]


@pytest.fixture(scope="module")
def options(tmp_path_factory, base_options) -> list[str]:
    config = ds_json(tmp_path_factory.mktemp("stop") / "ds.json")
    return [*base_options, *STEPS, "--deepspeed_config", config, "--output_dir"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options) -> list[dict]:
    folder = tmp_path_factory.mktemp("whole")
    codes, _, err = Ranks("pretrain.py", [*options, str(folder)]).finish()
    assert codes == [0, 0], err
    return rows(folder)


def child(process: subprocess.Popen[str], name: str) -> int:
    """The process of the launcher's group whose command line has ``name``; the first started."""
    found = [p for p in group_members(process.pid) if name in Path(f"/proc/{p}/cmdline").read_bytes().decode()]
    return min(found)


@pytest.mark.timeout(400)
def test_sigterm_through_the_launcher_and_again_to_one_rank(options, whole, tmp_path):
    """The launcher ends its ranks one after the other: the first one's signal must be enough for all."""
    metrics = tmp_path / "metrics.jsonl"
    process = launch(2, *options, str(tmp_path))
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 8, 120, process)
    os.kill(child(process, "deepspeed.launcher.launch"), signal.SIGTERM)
    code, out, err = finish(process, timeout=60)
    step = rows(tmp_path)[-1]["step"]
    assert code != 0
    assert f"stopped by SIGTERM after step {step}: saved in {tmp_path}/checkpoints/step{step:07d}" in out, err
    assert group_members(process.pid) == []

    ranks = Ranks("pretrain.py", [*options, str(tmp_path)])
    ranks.wait_for(lambda: metrics.read_text().count("\n") >= step + 5)
    ranks.signal(1, signal.SIGUSR1)
    codes, out, err = ranks.finish(timeout=60)
    assert codes == [75, 75], err
    assert f"resuming from step{step:07d}" in out and "stopped by" in out
    assert "Traceback" not in err

    found = rows(tmp_path)
    assert found == whole[: len(found)]  # as if nothing had happened, to the last bit


@pytest.mark.timeout(400)
def test_one_run_in_a_folder_and_none_without_its_launcher(options, tmp_path):
    """A second run is told of the first; a launcher that is killed takes its ranks with it, which save first."""
    metrics = tmp_path / "metrics.jsonl"
    process = launch(2, *options, str(tmp_path), "--max_steps", "100000", "--eval_every", "0")
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 120, process)
    first = child(process, "--local_rank=0")
    codes, _, err = Ranks("pretrain.py", [*options, str(tmp_path)], 1).finish()
    assert codes == [2], err
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "another run is in it (host " in line and f"process {first}, since " in line
    os.kill(process.pid, signal.SIGKILL)  # its helper, which started the ranks, lives on
    process.wait()
    end = time.monotonic() + 60
    while group_members(process.pid):
        assert time.monotonic() < end
        time.sleep(0.1)
    saved = (tmp_path / "checkpoints" / "latest").read_text()
    assert saved == f"step{rows(tmp_path)[-1]['step']:07d}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk to fill up")
@pytest.mark.timeout(400)
def test_a_full_disk(options, whole, tmp_path):
    """Training goes on without checkpoints; a stop then says that it could not save; with room again it resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this container may not mount a small disk to fill up: {mounted.stderr.strip()}")
    try:
        folder, filler = disk / "run", disk / "filler"
        metrics = folder / "metrics.jsonl"
        ranks = Ranks("pretrain.py", [*options, str(folder)])
        ranks.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 8)
        with filler.open("wb") as file:
            subprocess.run(["cat", "/dev/zero"], stdout=file, stderr=subprocess.DEVNULL)  # until no byte is left
        step = int((folder / "checkpoints" / "latest").read_text().removeprefix("step"))
        ranks.wait_for(lambda: "training goes on" in ranks.err())
        ranks.signal(1, signal.SIGTERM)
        codes, _, said = ranks.finish(timeout=60)
        assert codes == [1, 1], said
        assert "error: saving checkpoint" in said and "failed" in said and "Traceback" not in said
        filler.unlink()

        codes, out, err = Ranks("pretrain.py", [*options, str(folder)]).finish()
        assert codes == [0, 0], err
        assert f"resuming from step{step:07d}" in out
        assert rows(folder) == whole
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
