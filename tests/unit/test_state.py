"""Copies, pickles and state_dict: continuing bit for bit, and refusing what does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lorapre_dist import ConfigError, LoRAPre, LoRAPreConfig

from .toy import PAPER, STABLE, STEPS, Toy, assert_same, loss_of, state_tensors, train

# copies and pickles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_on_alone(steps, how, tmp_path):
    model = Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    train(model, optimizer, range(steps))
    if how == "deepcopy":
        other, its_optimizer = copy.deepcopy((model, optimizer))
    else:
        torch.save((model, optimizer), tmp_path / "both.pt")
        other, its_optimizer = torch.load(tmp_path / "both.pt", weights_only=False)
    assert its_optimizer.param_groups[0]["params"][0] is next(other.parameters())
    before = copy.deepcopy(model.state_dict())
    train(other, its_optimizer, range(steps, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    train(model, optimizer, range(steps, 8))
    assert_same(model, other)


# state_dict ----------------------------------------------------------------------------------------------------------


def plain(value):
    """Whether ``value`` consists of tensors, numbers, strings, lists and dicts only."""
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, str, bool, torch.Tensor)


@pytest.mark.parametrize(
    "options", [STABLE, PAPER, {**STABLE, "target_modules": ["q_proj", "mlp"], "gammas": (0.1, 0.2)}]
)
def test_save_load_and_continue_is_bit_identical(options, tmp_path):
    straight, model = Toy(), Toy()
    train(straight, LoRAPre(straight.named_parameters(), **options))
    optimizer = LoRAPre(model.named_parameters(), **options)
    train(model, optimizer, range(7))
    assert plain(optimizer.state_dict())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Toy(seed=9)
    resumed.load_state_dict(saved["model"])
    optimizer = LoRAPre(resumed.named_parameters(), **options)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(7, STEPS))
    assert_same(straight, resumed)


def test_a_loaded_state_is_a_copy_and_settings_keep_their_types():
    model = Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE, target_modules=("q_proj", "mlp"))
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    other = LoRAPre(Toy().named_parameters(), **STABLE, target_modules=("q_proj", "mlp"))
    other.load_state_dict(saved)
    frozen = copy.deepcopy(saved)
    loss_of(model, 2).backward()
    for p, q in zip(other.param_groups[0]["params"], model.parameters(), strict=True):
        p.grad = q.grad.clone()
    other.step()
    for index, entry in frozen["state"].items():
        for key, tensor in entry.items():
            assert torch.equal(saved["state"][index][key], tensor)
    for group, fresh in zip(other.param_groups, optimizer.param_groups, strict=True):
        for key in LoRAPreConfig.__dataclass_fields__:
            assert group[key] == fresh[key]
            assert type(group[key]) is type(fresh[key])


def test_loading_takes_over_the_groups_settings():
    """As in torch.optim: a schedule goes on where it was."""
    optimizer = LoRAPre(Toy().named_parameters(), **STABLE)
    optimizer.param_groups[0].update(lr=0.123, initial_lr=0.5)
    other = LoRAPre(Toy().named_parameters(), **STABLE)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["initial_lr"]) == (0.123, 0.5)
    assert other.param_groups[0]["params"][0].shape == (11, 8)


@pytest.mark.parametrize("saved, now", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "option", [{"work": "matrices"}, {"kernels": "eager"}, {"overlap": True, "overlap_limit": 10**9}]
)
def test_how_a_step_is_done_is_said_by_the_program_that_loads(option, saved, now):
    """Not by the one that saved, on another machine perhaps."""
    models = Toy(), Toy()
    there, here = (
        LoRAPre(m.named_parameters(), **{**STABLE, **(option if which == 1 else {})})
        for m, which in zip(models, (saved, now), strict=True)
    )
    wanted = {key: here.param_groups[0][key] for key in option}
    here.load_state_dict(there.state_dict())
    assert {key: here.param_groups[0][key] for key in option} == wanted
    assert any(there.param_groups[0][key] != value for key, value in wanted.items())


def test_a_tensor_lr_is_saved_and_loaded_as_a_copy(tmp_path):
    def made(lr):
        return LoRAPre(Toy().named_parameters(), **{**STABLE, "lr": torch.tensor(lr)})

    torch.save(made(0.25).state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = made(0.5)
    other.load_state_dict(saved)
    assert float(other.param_groups[0]["lr"]) == 0.25
    other.param_groups[0]["lr"].fill_(9)
    assert float(saved["param_groups"][0]["lr"]) == 0.25


def fit(**changes):
    """A toy with its optimizer; ``changes`` make it differ from what was saved."""
    model = changes.pop("model", None) or Toy()
    named = changes.pop("named", list(model.named_parameters()))
    optimizer = LoRAPre(named, **{**STABLE, **changes})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def renamed():
    return [(n.replace("q_proj.weight", "k2_proj.weight"), p) for n, p in Toy().named_parameters()]


def reshaped():
    model = Toy()
    model.q_proj = nn.Linear(8, 13).double()
    return model


def two_groups():
    named = list(Toy().named_parameters())
    return [{"params": named[:3]}, {"params": named[3:]}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda: {"rank": 3}, "group 0: rank was 4, is 3"),
        (lambda: {"rank_v": 2}, "group 0: rank_v was None, is 2"),
        (lambda: {"variant": "paper"}, "group 0: variant was 'stable', is 'paper'"),
        (lambda: {"target_modules": ["q_proj"]}, r"down_proj.weight: exp_avg was missing, is of shape \(8, 17\)"),
        (lambda: {"named": renamed()}, "k2_proj.weight: not in the saved state"),
        (lambda: {"named": renamed()}, "q_proj.weight: saved, but not a parameter here"),
        (lambda: {"named": list(Toy().named_parameters())[1:]}, "embed.weight: saved, but not a parameter here"),
        (lambda: {"model": reshaped()}, r"q_proj.weight: m_B was of shape \(12, 4\), is of shape \(13, 4\)"),
        (lambda: {"named": two_groups()}, "1 parameter groups were saved, there are 2"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_nothing_changed(changes, words):
    saved = fit().state_dict()
    optimizer = fit(**changes())
    optimizer.param_groups[0]["lr"] = 0.77
    tensors = {k: t.clone() for k, t in state_tensors(optimizer).items()}
    steps = [b.state.step for b in optimizer.bound()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with pytest.raises(ConfigError, match=words) as caught:
        optimizer.load_state_dict(saved)
    assert str(caught.value).startswith("the optimizer state does not fit: ")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, tensors[k]) for k, t in state_tensors(optimizer).items())
    assert [b.state.step for b in optimizer.bound()] == steps
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups


def test_a_damaged_state_is_refused_by_name():
    optimizer = fit()
    saved = copy.deepcopy(optimizer.state_dict())
    index = saved["param_groups"][0]["param_names"].index
    del saved["state"][index("mlp.w")]["rms_row"]
    saved["state"][index("q_proj.weight")]["m_B"] = torch.zeros(12, 3)
    with pytest.raises(ConfigError, match=r"mlp.w: rms_row was missing, is of shape \(8,\)") as caught:
        optimizer.load_state_dict(saved)
    assert "q_proj.weight: m_B was of shape (12, 3), is of shape (12, 4)" in str(caught.value)


def test_another_optimizers_state_is_refused():
    model = Toy()
    adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    with pytest.raises(ConfigError, match=r"q_proj.weight: m_B was missing, is of shape \(12, 4\)"):
        fit().load_state_dict(adamw.state_dict())
    with pytest.raises(ConfigError, match="this is no state_dict of an optimizer: it must have 'state'"):
        fit().load_state_dict({})


def test_many_differences_are_counted():
    saved = fit().state_dict()
    other = fit(named=[(f"other.{n}", p) for n, p in Toy().named_parameters()])
    with pytest.raises(ConfigError, match=r"\(and \d+ more\)$") as caught:
        other.load_state_dict(saved)
    assert len(str(caught.value)) < 400


def test_state_exists_before_the_first_step():
    """Allocated up front: a checkpoint may be loaded into a fresh optimizer, and memory is known at once."""
    model = Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]
    assert list(saved["state"]) == saved["param_groups"][0]["params"]
    assert {int(entry["step"]) for entry in saved["state"].values()} == {0}
    assert list(optimizer.state) == list(model.parameters())
    assert set(optimizer.state[model.mlp["w"]]) == {"m_B", "m_A", "v_B", "v_A", "rms_row", "step"}
    assert set(optimizer.state[model.head.weight]) == {"exp_avg", "exp_avg_sq", "step"}
    assert optimizer.state[model.head.weight]["exp_avg"].shape == model.head.weight.shape


def test_parameters_are_matched_by_name_and_unnamed_ones_by_place():
    model, named = Toy(), dict(Toy().named_parameters())
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    train(model, optimizer, range(2))
    backwards = LoRAPre(list(named.items())[::-1], **STABLE)
    backwards.load_state_dict(optimizer.state_dict())
    tensors = state_tensors(optimizer)
    assert all(torch.equal(t, tensors[key]) for key, t in state_tensors(backwards).items())
    unnamed = LoRAPre(Toy().parameters(), **{**STABLE, "rank": 2})
    other = LoRAPre(Toy().parameters(), **{**STABLE, "rank": 2})
    other.load_state_dict(unnamed.state_dict())
    with pytest.raises(ConfigError, match="13 parameters were saved, there are 12"):
        LoRAPre(list(Toy().parameters())[1:], **{**STABLE, "rank": 2}).load_state_dict(unnamed.state_dict())


def test_hooks_are_called():
    optimizer = fit()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append(saved.pop("more")))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", 1, "after loading"]


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_functions_save_and_load_on_one_device(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, model, resumed = Toy(), Toy(), Toy(seed=9)
    train(straight, LoRAPre(straight.named_parameters(), **STABLE))
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    train(model, optimizer, range(7))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed.load_state_dict(model.state_dict())
    optimizer = LoRAPre(resumed.named_parameters(), **STABLE)
    set_optimizer_state_dict(resumed, optimizer, state, options=options)
    train(resumed, optimizer, range(7, STEPS))
    assert_same(straight, resumed)
