"""``--pipeline`` and ``--tensor``: the same losses as without, and a rank that is lost ends the others."""

from __future__ import annotations

import json
import signal
import time

import pytest

from lorapre_dist.config import ConfigError
from lorapre_dist.training.run.settings import load_settings
from tests.covering import some
from tests.forks import Ranks
from tests.launch.conftest import TINY_LLAMA, ds_json

STEPS = 12
ROUTED = 1e-4  # of the norm of gradients after some steps: a router's weights are rounding's too
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


def assert_same(found: list[dict], wanted: list[dict], norm: float = FP32) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for k, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for key in ("loss", "eval_loss", "grad_norm"):
            if other.get(key) is not None:
                bound = norm if key == "grad_norm" and k > 1 else FP32
                assert one[key] == pytest.approx(other[key], rel=bound), (key, one, other)


# The pipeline alone is in the run that loses a rank.
AXES = [["pipeline"], ["tensor"], ["pipeline", "tensor"]]


@pytest.mark.slow
@pytest.mark.parametrize("axes", some(AXES, AXES[1:]))
def test_the_same_losses_as_without(axes, options, plain, tmp_path):
    command = [*options, *(word for axis in axes for word in (f"--{axis}", "2"))]
    ended = Ranks("pretrain.py", [*command, "--save_every", "0", "--output_dir", str(tmp_path)], world_size=4).finish()
    assert ended.codes == [0] * 4, ended.err
    assert f"{' x '.join(f'{axis} 2' for axis in axes)}, 4 ranks" in ended.out
    assert_same(rows(tmp_path), rows(plain))


@pytest.mark.slow
def test_experts_on_other_ranks_give_the_same_losses(base_options, tmp_path):
    """And a run goes on without expert parallelism from where one with it was saved."""
    config = ds_json(tmp_path / "ds.json", params={"rank": 8}, gradient_clipping=0.5)
    options = [*base_options, "--model", "mixtral-tiny", "--deepspeed_config", config, "--backend", "fsdp2"]
    options += ["--max_steps", "6", "--warmup_steps", "2", "--eval_every", "3", "--save_every", "3", "--no_tensorboard"]

    def train(folder: str, world_size: int, *more: str) -> list[dict]:
        command = [*options, *more, "--output_dir", str(tmp_path / folder)]
        ended = Ranks("pretrain.py", command, world_size=world_size).finish()
        assert ended.codes == [0] * world_size, ended.err
        assert ("expert 2" in ended.out) == ("--expert" in more)
        return rows(tmp_path / folder)

    plain = train("plain", 2)
    assert_same(train("two", 2, "--expert", "2"), plain, ROUTED)
    assert_same(train("four", 4, "--expert", "2"), plain, ROUTED)
    tags = sorted(path.name for path in (tmp_path / "four" / "checkpoints").iterdir() if path.is_dir())
    assert_same(train("four", 2, "--resume", tags[0]), plain, ROUTED)


def test_axes_may_stand_in_the_json(options, tmp_path):
    axes = {"pipeline": {"stages": 2}, "tensor_parallel": {"autotp_size": 2}}
    config = ds_json(tmp_path / "ds.json", params={"rank": 8}, zero_optimization={"stage": 1}, **axes)
    command = [*options, "--deepspeed_config", config]
    found = load_settings(command, world_size=8)
    assert (found.pipeline, found.tensor, found.batch.accumulation) == (
        2,
        2,
        load_settings(options, 2).batch.accumulation,
    )
    assert "tensor_parallel" not in found.ds_config  # AutoTP would take all ranks for data-parallel ones
    found = load_settings([*command, "--pipeline", "1", "--tensor", "1"], world_size=2)
    assert (found.pipeline, found.tensor) == (1, 1) and "tensor_parallel" not in found.ds_config


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
        (["--pipeline", "3"], "--pipeline 3 on 2 ranks: 3 must divide the number of ranks"),
        (["--pipeline", "2", "--tensor", "2"], "--pipeline 2 --tensor 2 on 2 ranks: 4 must divide the number of ranks"),
        (["--tensor", "2", "--backend", "fsdp2"], "--tensor 2 with --backend fsdp2 is not supported"),
        (["--pipeline", "2", "--gradient_checkpointing"], "pipeline.activation_checkpoint_interval"),
        (["--expert", "2"], "--expert 2 with --backend deepspeed is not supported: take --backend fsdp2"),
        (["--expert", "4", "--backend", "fsdp2"], "--expert 4 on 2 ranks: must divide the number of ranks"),
        (["--expert", "2", "--backend", "fsdp2", "--pipeline", "2"], "--pipeline 2 with --backend fsdp2"),
        (["--tensor", "0"], "--tensor 0: must be at least 1"),
    ],
)
def test_refusals_are_one_clear_line(more, words, options):
    with pytest.raises(ConfigError) as caught:
        load_settings([*options, *more], world_size=2)
    assert words in str(caught.value) and "\n" not in str(caught.value)
