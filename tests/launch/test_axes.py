"""``--pipeline`` and ``--tensor``: the same losses as without, and a rank that is lost ends the others."""

from __future__ import annotations

import json
import signal
import time

import pytest

from lorapre_dist.config import ConfigError
from lorapre_dist.training.run.settings import load_settings
from tests.forks import Ranks
from tests.launch.conftest import TINY_LLAMA, ds_json

STEPS = 12
FP32 = 1e-5  # of the loss, which fp32 summation order changes, and the weights after steps with it


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def options(base_options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("axes")
    (folder / "model.json").write_text(json.dumps({**TINY_LLAMA, "num_key_value_heads": 2}))
    config = ds_json(folder / "ds.json", params={"rank": 8}, zero_optimization={"stage": 1})
    steps = ["--max_steps", str(STEPS), "--warmup_steps", "3", "--eval_every", "6", "--no_tensorboard"]
    return [*base_options, *steps, "--model_config", str(folder / "model.json"), "--deepspeed_config", config]


@pytest.fixture(scope="module")
def plain(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    ended = Ranks("pretrain.py", [*options, "--save_every", "6", "--output_dir", str(folder)]).finish()
    assert ended.codes == [0, 0], ended.err
    return folder


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if other.get(key) is not None:
                assert one[key] == pytest.approx(other[key], rel=FP32), (key, one, other)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["--pipeline", "--tensor"])
def test_the_same_losses_as_without(axis, options, plain, tmp_path):
    command = [*options, axis, "2", "--save_every", "0", "--output_dir", str(tmp_path)]
    ended = Ranks("pretrain.py", command, world_size=4).finish()
    assert ended.codes == [0] * 4, ended.err
    assert f"{axis.strip('-')} 2, 4 ranks" in ended.out
    assert_same(rows(tmp_path), rows(plain))


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_the_same_command_resumes(options, plain, tmp_path):
    command = [*options, "--pipeline", "2", "--save_every", "4", "--collective_timeout", "10"]
    command += ["--output_dir", str(tmp_path)]
    run = Ranks("pretrain.py", command, world_size=4)
    run.wait_for(lambda: (tmp_path / "checkpoints" / "latest").exists())
    run.signal(3, signal.SIGKILL)
    begin = time.monotonic()
    ended = run.finish()
    assert time.monotonic() - begin < 30
    assert ended.codes[3] == -signal.SIGKILL and all(code == 1 for code in ended.codes[:3]), ended
    assert ended.err.count("lost another rank") == 3, ended.err
    ended = Ranks("pretrain.py", command, world_size=4).finish()
    assert ended.codes == [0] * 4, ended.err
    assert "resuming from" in ended.out
    assert_same(rows(tmp_path), rows(plain))


@pytest.mark.parametrize(
    "more, words",
    [
        (["--pipeline", "3"], "--pipeline 3 on 2 ranks: must divide the number of ranks"),
        (["--pipeline", "2", "--tensor", "2"], "--pipeline 2 with --tensor 2 is not supported: take one of them"),
        (["--tensor", "2", "--backend", "fsdp2"], "--tensor 2 with --backend fsdp2 is not supported"),
        (["--pipeline", "2", "--gradient_checkpointing"], "pipeline.activation_checkpoint_interval"),
        (["--tensor", "0"], "--tensor 0: must be at least 1"),
    ],
)
def test_refusals_are_one_clear_line(more, words, options):
    with pytest.raises(ConfigError) as caught:
        load_settings([*options, *more], world_size=2)
    assert words in str(caught.value) and "\n" not in str(caught.value)
