"""Checkpoints of engines: resume anywhere, refuse what does not fit or is damaged, survive a full disk."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from lorapre_dist.checkpoint import dcp
from tests.distributed.harness import run_ranks
from tests.resume import LAYOUTS, every_pair, some_pairs, visits

from .checkpoint_cases import (
    full_disk_case,
    gathered_case,
    load_case,
    native_visit_case,
    others_files_case,
    private_disk_case,
    resized_case,
    resume_case,
    save_case,
    visit_case,
    write_reference,
)

CPU_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}


def test_the_walk_takes_every_pair_once():
    walk = every_pair(len(LAYOUTS))
    pairs = list(itertools.pairwise(walk))
    assert len(pairs) == len(set(pairs)) == len(LAYOUTS) ** 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resume_from_every_layout_to_every_other(tmp_path, exhaustive):
    """Saved and loaded on the way, the run ends where the reference does that never stopped.

    256 times with ``--exhaustive``, otherwise from each layout to another.
    """
    walk = every_pair(len(LAYOUTS)) if exhaustive else some_pairs(len(LAYOUTS))
    errors = [error for _, error in visits(str(tmp_path), walk)]
    assert len(errors) == len(walk) and set(walk) == set(range(len(LAYOUTS)))
    assert max(errors) <= 1e-5
    # keep_last=2 held all the way
    kept = [f"global_step{len(walk) - 1}", f"global_step{len(walk)}"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == sorted(kept)


AROUND = [(2, 2), ("fsdp2", 3), (2, 2), ("ddp", 2), ("fsdp2", 4), ("one device", 1), (3, 3), ("ddp", 3), (0, 1)]


@pytest.mark.parametrize(
    "optimizer, path",
    [
        ("LoRAPre", AROUND),
        ("LoRAPreMuon", [(3, 3), ("fsdp2", 2), (1, 2), ("ddp", 3)]),
        ("LoRAPreAdafactor", [("fsdp2", 3), (3, 2), ("ddp", 2), (2, 3)]),
    ],
)
def test_resume_across_deepspeed_fsdp2_ddp_and_one_device(optimizer, path, tmp_path):
    """ZeRO-2 on two ranks to FSDP2 on three and back, and on through DDP and one process without process groups."""
    write_reference(str(tmp_path), len(path), optimizer)
    for step, (layout, world) in enumerate(path):
        arguments = {"folder": str(tmp_path), "step": step, "optimizer": optimizer}
        if isinstance(layout, int):
            results = run_ranks(world, visit_case, stage=layout, precision="fp32", **arguments)
        else:
            results = run_ranks(world, native_visit_case, layout=layout, **arguments)
        for error, name in results:
            assert error <= 1e-5, (layout, world, name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_across_layouts_in_half_precision(precision, tmp_path):
    """Gradients are exact in half precision here and the masters are fp32, so the tolerance is that of fp32."""
    path = [(2, 2, None), (3, 3, CPU_OFFLOAD), (0, 1, None), (3, 2, None), (1, 3, CPU_OFFLOAD), (0, 2, None)]
    write_reference(str(tmp_path), len(path))
    for step, (stage, world, changes) in enumerate(path):
        arguments = {"precision": precision, "folder": str(tmp_path), "changes": changes}
        for error, name in run_ranks(world, visit_case, stage=stage, step=step, **arguments):
            assert error <= 1e-5, (stage, world, name)


@pytest.mark.parametrize(
    "stage, precision, changes, background",
    [
        (0, "fp32", None, False),
        (0, "fp16", None, False),
        (1, "bf16", None, True),
        (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}, False),
        (2, "fp32", None, True),
        (2, "fp16", None, False),
        (2, "fp32", CPU_OFFLOAD, False),
        (3, "fp32", None, True),
        (3, "bf16", CPU_OFFLOAD, True),
        (3, "fp16", None, False),
    ],
)
def test_resume_in_the_same_layout_is_bit_identical(stage, precision, changes, background, tmp_path):
    arguments = {"stage": stage, "precision": precision, "folder": str(tmp_path), "changes": changes}
    for differences in run_ranks(2, resume_case, background=background, **arguments):
        assert differences and max(differences.values()) == 0.0, differences


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint ``three`` of two ranks under ZeRO-2."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_case, stage=2, folder=str(folder))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refusals(folder: Path, world: int = 2, stage: int = 3, **arguments) -> str:
    """What every rank alike complains about, having loaded nothing."""
    texts = run_ranks(world, load_case, stage=stage, folder=str(folder), **arguments)
    assert len(set(texts)) == 1
    assert texts[0].endswith(" unchanged=True"), texts[0]
    return texts[0].removesuffix(" unchanged=True")


def test_everything_loads_with_weights_only(saved):
    tag = saved / "three"
    archives = list(tag.rglob("*.pt"))
    assert {p.name for p in archives} >= {"extra.pt", "mp_rank_00_model_states.pt"}
    for path in archives:
        assert torch.load(path, weights_only=True)
    entries = dcp.shapes(tag / "tensors")  # through an unpickler that knows DCP's records alone
    assert {name.split(".")[0] for name in entries} == {"model", "optimizer", "untrained"}
    for name, entry in entries.items():
        assert dcp.whole(tag / "tensors", name, entry).shape == entry.size


def test_code_in_the_metadata_is_not_run(copy):
    (copy / "three" / "tensors" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(Exception, match=r"os\.system has no place in a checkpoint"):
        dcp.shapes(copy / "three" / "tensors")


def damaged(folder: Path, kind: str) -> str:
    tag = folder / "three"
    tensors = sorted((tag / "tensors").glob("*.distcp"))[-1]
    name = tensors.relative_to(tag).as_posix()
    content = bytearray(tensors.read_bytes())
    if kind == "truncated":
        tensors.write_bytes(content[:-10])
        return f"{name} has {len(content) - 10} bytes instead of {len(content)}"
    if kind == "flipped byte":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
        return f"{name} has a wrong checksum"
    if kind == "missing shard":
        tensors.unlink()
        return f"{name} is missing"
    if kind == "missing latest":
        (folder / "latest").unlink()
        return "has no file 'latest'; name one of: three"
    if kind == "extra rank":
        (tag / "tensors" / "__7_0.distcp").write_bytes(b"more")
        return "tensors/__7_0.distcp does not belong to it"
    if kind == "extra folder":
        (tag / "rank7").mkdir()
        (tag / "rank7" / "file.pt").write_bytes(b"more")
        return "rank7/file.pt does not belong to it"
    if kind == "no manifest":
        (tag / "manifest.json").unlink()
        return "three has no manifest.json"
    if kind == "old format":
        manifest = json.loads((tag / "manifest.json").read_text())
        (tag / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
        return "is of format 0; this version reads format 1"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "flipped byte",
        "missing shard",
        "missing latest",
        "extra rank",
        "extra folder",
        "no manifest",
        "old format",
    ],
)
def test_damage_is_named_and_nothing_loaded(kind, copy):
    words = damaged(copy, kind)
    assert words in refusals(copy)


def test_an_empty_folder_loads_nothing(tmp_path):
    assert run_ranks(2, load_case, stage=2, folder=str(tmp_path)) == ["loaded None"] * 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"tag": "four"}, "no checkpoint 'four' in"),
        ({"params": {"rank": 3}}, "more: rank was 4, is 3 (resize_rank=True, or a program's --resize_rank, adapts it)"),
        ({"params": {"variant": "paper"}}, "variant was stable, is paper"),
        ({"params": {"target_modules": ["q_proj"]}}, "more: kind was lorapre, is adamw; target_modules=["),
    ],
)
def test_what_differs_is_listed(arguments, words, saved):
    assert words in refusals(saved, **arguments)


@pytest.mark.parametrize("rank, rank_v", [(2, 1), (7, 3)])
def test_a_rank_is_changed_on_request(rank, rank_v, saved):
    """The product is the best approximation there is of the one saved; where the rank grows it is the same."""
    (before, *_) = run_ranks(2, resized_case, stage=2, folder=str(saved), params={"rank": 4, "rank_v": 1})
    (after, nothing) = run_ranks(2, resized_case, stage=3, folder=str(saved), params={"rank": rank, "rank_v": rank_v})
    assert nothing == {} and after.keys() == before.keys()
    for name, product in before.items():
        U, s, Vt = torch.linalg.svd(product.double(), full_matrices=False)
        kept = rank if name.endswith(".m") else rank_v
        best = (U[:, :kept] * s[:kept]) @ Vt[:kept]
        assert (after[name] - best).norm() <= 1e-5 * product.norm()  # fp32 factors


@pytest.mark.parametrize("world, stage", [(1, 2), (2, 0), (3, 1), (3, 2), (4, 3)])
def test_the_full_state_goes_round(world, stage, saved):
    """Gathered on rank 0 it is that of any other layout, and it loads into a fresh engine."""
    (want, _), *_ = run_ranks(2, gathered_case, stage=2, folder=str(saved))
    (first, second), *others = run_ranks(world, gathered_case, stage=stage, folder=str(saved))
    assert all(other == ({}, {}) for other in others)
    assert first.keys() == want.keys() == second.keys()
    for name, entry in want.items():
        assert entry["step"] == first[name]["step"] == second[name]["step"] == 3
        for key in entry.keys() - {"step"}:
            assert torch.equal(first[name][key], second[name][key])
            torch.testing.assert_close(first[name][key], entry[key], rtol=1e-4, atol=1e-7)  # another summation order


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_full_disk_is_reported_and_training_goes_on(stage, background, tmp_path):
    for text, same, left in run_ranks(2, full_disk_case, stage=stage, folder=str(tmp_path), background=background):
        assert "bad failed on rank 1: " in text
        # DeepSpeed's file, which comes first and which rank 1 writes under ZeRO-3, or DCP's.
        assert ("is the storage full?" if stage == 3 and not background else "File too large") in text
        assert same
        assert left == "good latest"  # nothing half-written
    assert (tmp_path / "latest").read_text() == "after"


def test_storage_that_is_not_shared_is_named_on_every_rank(tmp_path):
    for text in run_ranks(2, private_disk_case, folder=str(tmp_path)):
        assert "failed on rank 1: " in text and "must be on storage that all ranks share" in text
    assert not list(tmp_path.glob("*/*"))


def test_weights_alone(saved):
    """``load_module_only`` takes the weights of a checkpoint whose factors do not fit."""
    options = {"load_module_only": True}
    assert (
        run_ranks(2, load_case, stage=1, folder=str(saved), params={"rank": 2}, options=options) == ["loaded three"] * 2
    )


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "fp32")])
def test_deepspeeds_own_files_run_no_code(stage, precision, tmp_path):
    """Of an AdamW run: model states, and optimizer states under ZeRO; all of them load, none may ask for a call."""
    for said in run_ranks(2, others_files_case, stage=stage, precision=precision, folder=str(tmp_path)):
        loaded, refused = [t for t in said if t.startswith("loaded")], [t for t in said if "cannot be read" in t]
        assert loaded == ["loaded [1]", "loaded"]
        assert len(refused) == len(said) - 2 == (2 if stage == 0 else 3), said
        assert all("it asks for posix.mkdir" in text for text in refused)
