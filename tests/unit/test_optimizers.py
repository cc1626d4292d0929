"""LoRAPreMuon and the other optimizers on one device: the reference, settings, state, checkpoints, memory."""

from __future__ import annotations

import copy

import pytest
import torch

from lorapre_dist import ConfigError, LoRAPre, checkpoint
from lorapre_dist.checkpoint.folder import CheckpointError
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle

from .test_report import bound_and_peak
from .toy import FP64, LOW_RANK, Toy, assert_matches, assert_same, loss_of, state_tensors, train

OTHERS = [name for name in OPTIMIZERS if name != "LoRAPre"]
OPTIONS = {
    "LoRAPreMuon": {"rank": 4, "lr": 0.02, "weight_decay": 0.01, "adamw_lr": 0.01},
    "LoRAPreSGD": {"rank": 4, "lr": 0.02, "weight_decay": 0.01, "adamw_lr": 0.01},
    "LoRAPreLion": {"rank": 4, "lr": 0.002, "weight_decay": 0.01, "adamw_weight_decay": 0.02},
    "LoRAPreAdafactor": {"rank": 4, "lr": 0.01, "weight_decay": 0.01, "scale": 0.5},
}


def build(name, model, **more):
    return OPTIMIZERS[name](model.named_parameters(), **{**OPTIONS[name], **more})


def factor(step):
    return max(0.2, 1 - 0.06 * step)


def reference_path(name, model, steps):
    """The dense reference on the toy model, under a schedule."""
    config = OPTIMIZERS[name].config_class(**OPTIONS[name])
    theta = {n: p.data for n, p in model.named_parameters()}
    state = oracle.init(theta, config, lambda n, p: n in LOW_RANK)
    for step in range(steps):
        model.zero_grad()
        loss_of(model, step).backward()
        now = OPTIMIZERS[name].config_class(**{**OPTIONS[name], "lr": config.lr * factor(step)})
        oracle.step(theta, {n: p.grad for n, p in model.named_parameters()}, state, now, config.lr)


@pytest.mark.parametrize("name", OTHERS)
def test_matches_the_reference_under_a_schedule(name):
    """The schedule is of ``lr``; the learning rate of the parameters under AdamW follows it."""
    model, wanted = Toy(), Toy()
    optimizer = build(name, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(20):
        train(model, optimizer, [step])
        schedule.step()
    reference_path(name, wanted, 20)
    assert set(optimizer.factors()) == LOW_RANK
    assert_matches(model, wanted, FP64)


@pytest.mark.parametrize("name", OTHERS)
def test_bf16_parameters_have_fp32_state(name):
    model = Toy(torch.bfloat16)
    before = copy.deepcopy(model)
    optimizer = build(name, model)
    train(model, optimizer, range(2))
    assert {t.dtype for t in state_tensors(optimizer).values()} == {torch.float32}
    for (key, p), (_, was) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert p.isfinite().all() and not torch.equal(p, was), key


# settings ------------------------------------------------------------------------------------------------------------


BAD = [
    ("LoRAPreMuon", {"momentum": 1.0}, "momentum=1.0: must be a number in [0, 1)"),
    ("LoRAPreMuon", {"ns_steps": 0}, "ns_steps=0: must be an integer of at least 1"),
    ("LoRAPreMuon", {"ns_steps": 100}, "ns_steps=100: must be less than 100"),
    ("LoRAPreMuon", {"nesterov": 1}, "nesterov=1: must be true or false"),
    ("LoRAPreMuon", {"ns_coefficients": [1, 2]}, "ns_coefficients=(1, 2): must be three numbers"),
    (
        "LoRAPreMuon",
        {"adjust_lr_fn": "rms"},
        "adjust_lr_fn='rms': must be one of 'original', 'match_rms_adamw', None",
    ),
    ("LoRAPreMuon", {"adamw_lr": -1}, "adamw_lr=-1: must be a number in [0, inf)"),
    ("LoRAPreMuon", {"betas": [0.9, 0.9]}, "unknown LoRAPreMuon option 'betas'; did you mean 'adamw_betas'?"),
    ("LoRAPreMuon", {"rank_v": 2}, "unknown LoRAPreMuon option 'rank_v'; did you mean 'rank'?"),
    ("LoRAPreSGD", {"gamma": 0}, "gamma=0: must be a number in (0, 1]"),
    ("LoRAPreSGD", {"momentun": 0.5}, "unknown LoRAPreSGD option 'momentun'; did you mean 'momentum'?"),
    ("LoRAPreLion", {"betas": 0.9}, "betas=0.9: must be two numbers"),
    ("LoRAPreAdafactor", {"eps": "0"}, "eps='0': must be a number in [0, inf)"),
]


@pytest.mark.parametrize("name, options, message", BAD)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ConfigError) as caught:
        OPTIMIZERS[name](Toy().named_parameters(), **{"rank": 4, **options})
    assert str(caught.value) == message


def test_defaults_are_those_of_torch_muon_but_for_a_shorter_momentum():
    theirs = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    config = OPTIMIZERS["LoRAPreMuon"].config_class()
    assert (config.resolved_momentum, config.decay) == (0.8, 0.8)
    for name, value in theirs.items():
        if name != "momentum":
            assert (config.resolved_nesterov if name == "nesterov" else getattr(config, name)) == value, name
    paper = OPTIMIZERS["LoRAPreMuon"].config_class(variant="paper")
    assert (paper.resolved_momentum, paper.resolved_nesterov) == (theirs["momentum"], False)


def test_a_state_from_before_keeps_its_momentum():
    """Its factors are as large as that momentum makes them."""
    before = Toy()
    trained = build("LoRAPreMuon", before, momentum=0.95)
    train(before, trained, range(3))
    after = copy.deepcopy(before)
    resumed = build("LoRAPreMuon", after)
    resumed.load_state_dict(trained.state_dict())
    for model, optimizer in ((before, trained), (after, resumed)):
        train(model, optimizer, range(3, 6))
    assert_same(after, before)


def test_groups_have_their_own_settings_and_typos_in_them_are_named():
    named = dict(Toy().named_parameters())
    groups = [
        {"params": [("q_proj.weight", named["q_proj.weight"])], "rank": 2, "lr": 0.5},
        {"params": [("down_proj.weight", named["down_proj.weight"])], "rank": 0},
        {"params": [("mlp.w", named["mlp.w"])], "ns_steps": 3},
    ]
    optimizer = OPTIMIZERS["LoRAPreMuon"](groups, rank=4)
    assert {n: f["m_B"].shape[1] for n, f in optimizer.factors().items()} == {"q_proj.weight": 2, "mlp.w": 4}
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.5, 1e-3, 1e-3]
    with pytest.raises(ConfigError, match=r"unknown LoRAPreMuon option 'ns_step' .* did you mean 'ns_steps'"):
        optimizer.add_param_group({"params": [("head.weight", named["head.weight"])], "ns_step": 2})


def adamw_lr(optimizer, group=0):
    options = optimizer.param_groups[group]
    return optimizer.vector_hyper(optimizer.group_config(options), options).lr


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "LoRAPreAdafactor"])
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_a_warm_up_by_hand_from_zero_is_followed_by_the_other_parameters(name, where):
    """Nothing moves at 0; then ``adamw_lr`` rises and falls with ``lr``, and is never exceeded."""
    model = Toy()
    params = model.named_parameters() if where == "constructor" else [{"params": model.named_parameters(), "lr": 0.0}]
    optimizer = OPTIMIZERS[name](params, rank=4, adamw_lr=0.01, lr=0.0 if where == "constructor" else 0.1)
    before = copy.deepcopy(model)
    train(model, optimizer, range(2))
    assert_same(model, before)
    full = optimizer.config_class.lr if where == "constructor" else 0.1
    group = optimizer.param_groups[0]
    for lr, share in [(0.25 * full, 0.25), (full, 1.0), (4 * full, 1.0), (full, 0.25), (2 * full, 0.5), (0.0, 0.0)]:
        group["lr"] = lr
        assert adamw_lr(optimizer) == pytest.approx(0.01 * share)
    resumed = OPTIMIZERS[name](Toy().named_parameters(), rank=4, adamw_lr=0.01, lr=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["lr"] = full
    assert adamw_lr(resumed) == pytest.approx(0.0025)
    group["lr"] = full
    train(model, optimizer, range(2, 4))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


# state ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_state_dicts_continue_bit_for_bit(name):
    model = Toy()
    optimizer = build(name, model)
    train(model, optimizer, range(5))
    for method in ("state_dict", "full_state_dict"):
        saved = copy.deepcopy(getattr(optimizer, method)())
        again = copy.deepcopy(model)
        other = build(name, again)
        getattr(other, f"load_{method}")(saved)
        train(again, other, range(5, 8))
        straight = copy.deepcopy(model)
        third = build(name, straight)
        third.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(straight, third, range(5, 8))
        assert_same(again, straight)
    expected = {"m_B", "m_A", "step"} | ({"rms_row", "rms_col"} if name == "LoRAPreAdafactor" else set())
    assert set(optimizer.full_state_dict()["mlp.w"]) == expected


def test_the_state_of_another_optimizer_is_refused():
    muon, sgd = build("LoRAPreMuon", Toy()), build("LoRAPreSGD", Toy())
    with pytest.raises(ConfigError, match="optimizer was LoRAPreMuon, is LoRAPreSGD"):
        sgd.load_state_dict(muon.state_dict())


@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints(name, tmp_path):
    model = Toy()
    optimizer = build(name, model)
    train(model, optimizer, range(4))
    checkpoint.save(model, optimizer, tmp_path, "here")
    train(model, optimizer, range(4, 7))
    other = Toy(seed=1)
    resumed = build(name, other)
    checkpoint.load(other, resumed, tmp_path)
    train(other, resumed, range(4, 7))
    assert_same(model, other)
    for rank in (3, 5):
        resized = build(name, other, rank=rank)
        with pytest.raises(CheckpointError, match=r" and 2 more: rank was 4, is \d \(resize_rank=True"):
            checkpoint.load(other, resized, tmp_path)
        checkpoint.load(other, resized, tmp_path, resize_rank=True)
        train(other, resized, range(1))
    with pytest.raises(CheckpointError, match=f"optimizer was {name}, is LoRAPre"):
        checkpoint.load(other, LoRAPre(other.named_parameters(), rank=4), tmp_path)


# memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, vectors", [("LoRAPreMuon", 0), ("LoRAPreLion", 0), ("LoRAPreAdafactor", 1)])
def test_memory_report_by_hand(name, vectors):
    report = build(name, Toy()).memory_report()
    matrices = [(12, 8), (8, 17), (8, 6)]
    others = sum(p.numel() for p in Toy().parameters()) - sum(p * q for p, q in matrices)
    assert report.state_bytes == 8 * (sum((p + q) * (4 + vectors) for p, q in matrices) + 2 * others)


@pytest.mark.parametrize("shape", [(512, 512), (300, 900), (900, 300)])
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_stays_within_the_workspace_it_reports(name, shape):
    p = torch.nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    bound, peak = bound_and_peak(lambda: OPTIMIZERS[name]([("q_proj.weight", p)], rank=32))
    assert peak <= bound
    if name == "LoRAPreMuon":  # its m of the matrix's size is in it
        assert peak >= 4 * shape[0] * shape[1]
