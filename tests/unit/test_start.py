"""What is imported before a command line is checked: nothing that takes seconds. And who is registered with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "accelerate",
    "pandas",
    "pyarrow",
    "matplotlib",
    "tokenizers",
)
# Runs each command line in turn, and says what of it was imported by then.
RUN = f"""
import contextlib, io, json, runpy, sys
found = []
for program, *argv in json.loads(sys.argv[1]):
    sys.argv, out, err = [program, *argv], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(program, run_name="__main__")
            code = None
        except SystemExit as ended:
            code = ended.code
    found.append([code, out.getvalue(), err.getvalue(), [m for m in {HEAVY} if m in sys.modules]])
print(json.dumps(found))
"""
# The programs themselves end by ``os._exit``.
START = "import sys; from {module} import main; sys.exit(main())"


ALL = ("plan", "--model", "llama-70b", "--layout", "fsdp1")


def python(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_lines_are_answered_before_anything_heavy_is_imported(tmp_path):
    for module in ("training.run.app", "training.finetune.app", "launcher.app"):
        (tmp_path / f"{module.replace('.', '_')}.py").write_text(START.format(module=f"lorapre_dist.{module}"))
    bad = tmp_path / "bad.json"
    bad.write_text('{"train_batch_size": 4, "optimizer": {"type": "LoRAPre", "params": {"lr": 0.01, "rnak": 4}}}')
    pretrain, finetune, run = ("training_run_app", "training_finetune_app", "launcher_app")
    asked = {
        ("lorapre_dist", "--version"): (0, "lorapre "),
        ("lorapre_dist", "--help"): (0, "commands, each with an example"),
        ("lorapre_dist", "plan", "--help"): (0, "--world_size"),
        ("lorapre_dist", "tokenize", "--help"): (0, "--max_tokens"),
        ("lorapre_dist", "inspect", "--jsn"): (2, "error: "),
        ("lorapre_dist", "plna"): (2, "did you mean plan?"),
        ("lorapre_dist", "configs"): (0, "llama_60m_zero2 "),
        ("lorapre_dist", "launch", "--lancher", "pdsh"): (2, "settings"),
        ("lorapre_dist", "plan", "--model", "llama-60m", "--world_size", "8"): (0, "ZeRO-2"),
        ("lorapre_dist", *ALL, "--optimizer", "all", "--device", "h100"): (0, "predicted ms of a step"),
        (pretrain, "--help"): (0, "--deepspeed_config"),
        (pretrain, "--modle", "x"): (2, "unknown option --modle"),
        (pretrain, "--deepspeed_config", "nothing.json"): (2, "nothing.json: no such file"),
        (pretrain, "--deepspeed_config", str(bad)): (2, "did you mean 'rank'"),
        (pretrain, "--deepspeed_config", "ds_configs/tiny_zero2.json", "--dataset", str(tmp_path)): (2, "holds no"),
        (finetune, "--help"): (0, "--score"),
        (finetune, "--model", "x", "--modle", "y"): (2, "unknown option --modle"),
        (run, "--help"): (0, "--launcher"),
        (run, "nothing.ini"): (2, "nothing.ini"),
    }
    bad_folder = tmp_path / "empty"
    bad_folder.mkdir()
    lines = [[str(bad_folder) if word == str(tmp_path) else word for word in line] for line in asked]
    found = json.loads(python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{RUN}", json.dumps(lines)))
    for line, (code, words), (ended, out, err, heavy) in zip(lines, asked.values(), found, strict=True):
        assert not heavy, (line, heavy)
        assert ended == code, (line, out, err)
        assert words in (err if code else out), line
        assert not code or (err.startswith("error") and err.count("\n") == 1), (line, err)


ORDERS = {
    "last": "import torch, deepspeed; import lorapre_dist",
    "between": "import torch; import lorapre_dist; import deepspeed",
    "first": "import lorapre_dist.core.interval; import deepspeed",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_deepspeed_finds_the_optimizers_whatever_is_imported_first(order):
    """As ``deepspeed.initialize`` does it: by name, and through the engine's methods."""
    python(
        f"""
{ORDERS[order]}
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from lorapre_dist.config import CONFIGS

for name in CONFIGS:
    cls = getattr(torch.optim, name)
    assert issubclass(cls, torch.optim.Optimizer) and cls.config_class is CONFIGS[name]
from torch.optim import LoRAPreMuon
assert not hasattr(torch.optim, "LoRAPer") and torch.optim.AdamW
assert DeepSpeedEngine._configure_distributed_model.__module__ == "lorapre_dist.integrations.deepspeed.register"
assert OpBuilder.jit_load.__globals__["__name__"] == "lorapre_dist.integrations.deepspeed.op_builds"
called = []
DeepSpeedEngine.__init__ = lambda self: None
from lorapre_dist.integrations.deepspeed import bind
bind.register()
try:
    DeepSpeedEngine()._configure_distributed_model(None)
except AttributeError as error:  # it gets as far as what ranks compare
    assert "client_optimizer" in str(error), error
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
assert lorapre_dist.LoRAPre in ZERO_SUPPORTED_OPTIMIZERS
"""
    )


def test_every_public_name_is_there():
    import lorapre_dist

    for name in lorapre_dist.__all__:
        assert getattr(lorapre_dist, name) is not None and name in dir(lorapre_dist)
    assert callable(lorapre_dist.param_groups)
    with pytest.raises(AttributeError, match="has no attribute 'LoRAPer'"):
        lorapre_dist.LoRAPer  # noqa: B018
