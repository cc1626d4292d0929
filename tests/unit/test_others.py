"""Embedding, head and other 2-D parameters that are no projections, in other forms than AdamW's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorapre_dist import LoRAPre, LoRAPreConfig, checkpoint, reference
from lorapre_dist.config import ConfigError
from lorapre_dist.core.factors import initial_A
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.state.full import recoded

from .toy import FP64, STABLE, Toy, assert_same, loss_of, state_tensors, train, train_three_rows

TABLES = {"embed.weight": (11, 8), "head.weight": (5, 6), "k_proj.weight": (3, 12), "up_proj.weight": (17, 3)}


def dense_adafactor(theta, g, state, lr, beta2, decay):
    """arXiv 1804.04235, Algorithm 4 without first moment, relative step or its clipping: elements are clipped at 3."""
    state["t"] += 1
    state["R"] = beta2 * state["R"] + (1 - beta2) * g.square().mean(1)
    state["C"] = beta2 * state["C"] + (1 - beta2) * g.square().mean(0)
    v = torch.outer(state["R"], state["C"]) / state["C"].mean() / (1 - beta2 ** state["t"])
    theta.mul_(1 - lr * decay).sub_(lr * (g / (v.sqrt() + 1e-8)).clamp(-3, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adafactor_for_what_is_no_projection(optimizer):
    """Whatever steps the projections: the same on the gradients that it leads to."""
    model = Toy()
    own = {} if optimizer in ("LoRAPre", "LoRAPreAdafactor") else {"adamw_lr": 0.01, "adamw_weight_decay": 0.1}
    options = {"lr": 0.01, "weight_decay": 0.1, "rank": 4, "other_state": "adafactor", **own}
    stepper = OPTIMIZERS[optimizer](model, **options)
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if name in TABLES}
    state = {name: {"t": 0, "R": torch.zeros(p), "C": torch.zeros(q)} for name, (p, q) in TABLES.items()}
    for step in range(8):
        stepper.zero_grad()
        loss_of(model, step).backward()
        for name in TABLES:
            dense_adafactor(theta[name], model.get_parameter(name).grad, state[name], 0.01, 0.999, 0.1)
        stepper.step()
    for name, want in theta.items():
        assert torch.allclose(model.get_parameter(name), want, rtol=1e-9, atol=1e-12), name
    held = state_tensors(stepper)
    assert {name for name, key in held if key == "rms_col"} >= TABLES.keys()
    assert not any(key.startswith("exp_avg") for name, key in held if name in TABLES)
    assert not TABLES.keys() & stepper.factors().keys()


@pytest.mark.parametrize("optimizer", ["LoRAPre", "LoRAPreMuon"])
def test_low_rank_embeddings_are_stepped_as_lorapre_steps_matrices_at_adamws_settings(optimizer):
    model = Toy()
    own = {} if optimizer == "LoRAPre" else {"adamw_lr": 0.01}
    stepper = OPTIMIZERS[optimizer](model, lr=0.01, rank=4, embeddings="low_rank", **own)
    config = LoRAPreConfig(lr=0.01, rank=4, scale=1.0)
    name, shape = "embed.weight", (11, 8)
    A = [initial_A(name, moment, r, shape[1], config.init_std, 0) for moment, r in config.ranks.items()]
    theta, state = model.embed.weight.detach().clone(), reference.init_state(shape, config, *A)
    for step in range(8):
        stepper.zero_grad()
        loss_of(model, step).backward()
        reference.lorapre_adam_step(theta, model.embed.weight.grad, state, config)
        stepper.step()
    assert float((model.embed.weight.detach() - theta).norm() / theta.norm()) <= FP64
    assert set(stepper.factors()) == {"embed.weight", "head.weight", "q_proj.weight", "down_proj.weight", "mlp.w"}
    assert stepper.low_rank_names(model) == set(stepper.factors())


def test_rows_that_never_have_a_gradient_have_no_factors_and_do_not_move():
    model = Toy()
    optimizer = LoRAPre(model, **STABLE, embeddings="low_rank")
    before = model.embed.weight.detach().clone()
    train_three_rows(model, optimizer)
    assert torch.equal(model.embed.weight[3:], before[3:])
    assert not optimizer.factors()["embed.weight"]["m_B"][3:].any()
    assert not torch.equal(model.embed.weight[:3], before[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"other_state": "adafactor"},
        {"embeddings": "low_rank", "state_dtype": "8bit"},
        {"other_state": "adamw8bit", "state_dtype": "8bit"},
    ],
)
@pytest.mark.parametrize("way", ["state_dict", "full", "checkpoint", "copy"])
def test_a_resumed_run_has_the_same_bits(tmp_path, way, options):
    model = Toy(torch.float32)
    optimizer = LoRAPre(model, **STABLE, **options)
    train(model, optimizer, range(4))
    other = copy.deepcopy(model)
    resumed = LoRAPre(other, **STABLE, **options)
    if way == "state_dict":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "full":
        resumed.load_full_state_dict(optimizer.full_state_dict())
    elif way == "copy":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        checkpoint.save(model, optimizer, tmp_path, "tag")
        checkpoint.load(other, resumed, tmp_path)
    train(model, optimizer, range(4, 7))
    train(other, resumed, range(4, 7))
    assert_same(model, other)


def test_bytes_of_state_by_hand():
    def held(**options):
        return LoRAPre(Toy(torch.float32), rank=4, **options).memory_report().state_bytes

    tables = sum(p * q for p, q in TABLES.values())
    assert held() - held(other_state="adafactor") == 8 * tables - 4 * sum(p + q for p, q in TABLES.values())
    both = (11 + 8) * 5 * 4 + 4 * 11 + (5 + 6) * 5 * 4 + 4 * 5
    assert held() - held(embeddings="low_rank") == 8 * (11 * 8 + 5 * 6) - both


def test_state_of_another_kind_is_refused(tmp_path):
    model = Toy(torch.float32)
    optimizer = LoRAPre(model, **STABLE, other_state="adafactor")
    train(model, optimizer, range(2))
    checkpoint.save(model, optimizer, tmp_path, "tag")
    with pytest.raises(checkpoint.CheckpointError, match=r"embed.weight and 3 more: kind was lorapre, is adamw"):
        checkpoint.load(model, LoRAPre(model, **STABLE), tmp_path)


@pytest.mark.parametrize("way", ["state_dict", "full", "checkpoint"])
@pytest.mark.parametrize("then, now", [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_adamws_moments_are_converted(tmp_path, way, then, now):
    """Into 8 bits to the nearest number, which is within 0.8% of the row's largest; back without loss."""
    model = Toy(torch.float32)
    saved, loaded = (LoRAPre(model, **STABLE, other_state=state) for state in (then, now))
    train(model, saved, range(3))
    if way == "state_dict":
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    elif way == "full":
        loaded.load_full_state_dict(saved.full_state_dict())
    else:
        checkpoint.save(model, saved, tmp_path, "tag")
        with pytest.warns(UserWarning, match="AdamW's moments of 4 parameters were saved in another form"):
            checkpoint.load(model, loaded, tmp_path)
    before, after = saved.full_state_dict(), loaded.full_state_dict()
    for name in TABLES:
        a, b = (recoded(state[name], False) for state in (before, after))
        assert before[name]["step"] == after[name]["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            most = a[key].abs().amax(1, keepdim=True) * (0.008 if now == "adamw8bit" else 1e-6)
            assert ((a[key] - b[key]).abs() <= most).all(), (name, key)
    train(model, loaded, range(3, 5))


@pytest.mark.parametrize("options", [{"other_state": "adam"}, {"embeddings": True}])
def test_bad_values(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.*must be one of"):
        LoRAPre(Toy(), **STABLE, **options)


def test_what_groups_leave_to_adamw_can_have_adafactors_state():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "q_proj": nn.Linear(6, 8)})
    named = dict(model.named_parameters())
    rest = [(n, p) for n, p in named.items() if n != "q_proj.weight"]
    groups = [{"params": [("q_proj.weight", named["q_proj.weight"])]}, {"params": rest, "rank": 0}]
    optimizer = LoRAPre(groups, rank=2, other_state="adafactor", embeddings="low_rank")
    held = state_tensors(optimizer)
    assert ("embed.weight", "rms_row") in held and ("q_proj.bias", "exp_avg") in held
