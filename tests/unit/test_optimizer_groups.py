"""Parameter groups, names and initial factors: what is taken, and what is refused in which words."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lorapre_dist import ConfigError, LoRAPre

from .toy import FP64, LOW_RANK, PAPER, STABLE, STEPS, Reference, Toy, assert_matches, assert_same, train

# groups --------------------------------------------------------------------------------------------------------------


def test_groups_with_their_own_options():
    model, wanted = Toy(), Toy()

    def groups(m):
        named = dict(m.named_parameters())
        own = {"down_proj.weight": {"rank": 0, "lr": 0.02}, "mlp.w": {"rank": 2, "betas": (0.5, 0.9), "scale": 1.0}}
        rest = [(n, p) for n, p in named.items() if n not in own]
        return [{"params": rest}, *({"params": [(n, named[n])], **o} for n, o in own.items())], own

    given, own = groups(model)
    optimizer, oracle = LoRAPre(given, **STABLE), Reference(wanted.named_parameters(), **STABLE)
    oracle.overrides = own
    train(model, optimizer)
    train(wanted, oracle)
    assert_matches(model, wanted, FP64)
    assert {n: f["m_B"].shape[1] for n, f in optimizer.factors().items()} == {"q_proj.weight": 4, "mlp.w": 2}
    assert "exp_avg" in optimizer.bound()[-2].state.tensors()


def test_target_modules_choose():
    model = Toy()
    optimizer = LoRAPre(model.named_parameters(), target_modules=["head", r"embed\.weight"], **STABLE)
    assert set(optimizer.factors()) == {"head.weight", "embed.weight"}


def test_a_group_added_before_and_after_the_first_step():
    model, wanted = Toy(), Toy()
    late = {"down_proj.weight": {"lr": 0.003}, "head.weight": {"weight_decay": 0.3}}
    named = dict(model.named_parameters())
    optimizer = LoRAPre([(n, p) for n, p in named.items() if n not in late], **STABLE)
    optimizer.add_param_group({"params": [("head.weight", named["head.weight"])], **late["head.weight"]})
    early = Reference([(n, p) for n, p in wanted.named_parameters() if n != "down_proj.weight"], **STABLE)
    early.overrides = late
    train(model, optimizer, range(3))
    train(wanted, early, range(3))
    optimizer.add_param_group({"params": [("down_proj.weight", named["down_proj.weight"])], "lr": 0.003})
    early.named["down_proj.weight"] = dict(wanted.named_parameters())["down_proj.weight"]
    train(model, optimizer, range(3, STEPS))
    train(wanted, early, range(3, STEPS))
    assert_matches(model, wanted, FP64)
    assert "down_proj.weight" in optimizer.factors()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"rank": -1}, "rank=-1: must be an integer"),
        ({"lr": -1.0}, r"lr=-1.0: must be a number in \[0, inf\)"),
        ({"variant": "papers"}, "variant='papers'"),
        ({"weigth_decay": 0.1}, "unknown LoRAPre option 'weigth_decay' in a parameter group; did you mean 'weight_d"),
        ({"Rank": 2}, "did you mean 'rank'"),
        ({"target_modules": "*"}, "target_modules='\\*': not a valid regular expression"),
    ],
)
def test_a_bad_group_is_refused_and_leaves_no_trace(option, words):
    model = Toy()
    group = {"params": [("late_proj.weight", nn.Parameter(torch.zeros(9, 9)))], **option}
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    with pytest.raises(ConfigError, match=words):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(1))
    with pytest.raises(ConfigError, match=words):
        LoRAPre([dict(group)], **STABLE)


def test_what_others_keep_in_a_group_is_left_alone():
    group = {"params": Toy().named_parameters(), "initial_lr": 0.1, "name": "all", "max_lr": 1.0, "swap": 3}
    optimizer = LoRAPre([group], **STABLE)
    assert optimizer.param_groups[0]["name"] == "all"
    assert optimizer.state_dict()["param_groups"][0]["swap"] == 3


# parameters: names, duplicates, wrappers -----------------------------------------------------------------------------


def test_bare_tensors_are_low_rank_by_shape():
    shapes = [(8, 9), (5, 4), (9,), (3, 3, 3), (6, 6)]
    tensors = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = LoRAPre(tensors, rank=4)
    assert sorted(f["m_A"].shape[1] for f in optimizer.factors().values()) == [6, 9]
    for t in tensors:
        t.grad = torch.ones_like(t)
    optimizer.step()
    assert all(bool((t < 1).all()) for t in tensors)


def test_bare_tensors_cannot_be_chosen_by_name():
    with pytest.raises(ConfigError, match=r"target_modules=.*q_proj.*pass model.named_parameters\(\)"):
        LoRAPre(Toy().parameters(), target_modules=["q_proj"], rank=2)


def test_bare_tensors_below_the_rank_are_refused_because_of_the_rank():
    with pytest.raises(ConfigError, match=r"^rank=8: .*\(8 x 9\), so rank must be below 8$"):
        LoRAPre([nn.Parameter(torch.zeros(8, 9)), nn.Parameter(torch.zeros(4, 4))], rank=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 12}, r"^rank=12: larger than what any selected matrix allows; the largest is q_proj.weight \(12 x 8"),
        ({"rank": 4, "target_modules": "nope"}, "^target_modules='nope': matches no matrix"),
        ({"rank": 4, "rank_v": 99}, "^rank_v=99: larger than"),
    ],
)
def test_nothing_low_rank_is_refused_at_construction(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        LoRAPre(Toy().named_parameters(), **options)
    assert "\n" not in str(caught.value)


def test_a_model_of_frozen_matrices_is_refused():
    model = Toy()
    for name in LOW_RANK | {"k_proj.weight", "up_proj.weight"}:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ConfigError, match="the default target_modules: matches no matrix"):
        LoRAPre(model.named_parameters(), rank=2)


def test_groups_that_leave_nothing_low_rank_are_refused():
    """Only the settings of a parameter's own group count."""
    named = dict(Toy().named_parameters())
    rest = [(n, p) for n, p in named.items() if n not in LOW_RANK]
    matrices = [(n, named[n]) for n in sorted(LOW_RANK)]
    with pytest.raises(ConfigError, match=r"^rank=4: larger than what any selected matrix allows; .* \(.*3"):
        LoRAPre([{"params": rest}, {"params": matrices, "rank": 0}], **STABLE)
    with pytest.raises(ConfigError, match=r"^rank=0: every parameter group has it"):
        LoRAPre([{"params": rest, "rank": 0}, {"params": matrices, "rank": 0}], **STABLE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 4}, "unknown LoRAPre option 'ranks'; did you mean 'rank'"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"betas": (0.9, 1.0)}, r"betas=1.0: must be a number in \[0, 1\)"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"lr": torch.tensor([0.1, 0.2])}, "lr=tensor"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LoRAPre(Toy().named_parameters(), **options)


def test_duplicate_names_are_refused_at_construction_and_later():
    a, b = (nn.Parameter(torch.zeros(8, 9)) for _ in range(2))
    words = "parameter 'q_proj' appears twice"
    with pytest.raises(ConfigError, match=words):
        LoRAPre([("q_proj", a), ("q_proj", b)], rank=2)
    with pytest.raises(ConfigError, match=words):
        LoRAPre([("q_proj", a), ("module.q_proj", b)], rank=2)  # the same once wrappers are taken off
    with pytest.raises(ConfigError, match=words):
        LoRAPre([{"params": [("q_proj", a)]}, {"params": [("q_proj", b)]}], rank=2)
    optimizer = LoRAPre([("q_proj", a)], rank=2)
    optimizer.factors()
    with pytest.raises(ConfigError, match=words):
        optimizer.add_param_group({"params": [("q_proj", b)]})
    assert len(optimizer.param_groups) == 1


def test_the_same_tensor_twice_is_refused():
    a = nn.Parameter(torch.zeros(8, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns before
        with pytest.raises(ConfigError, match="appears twice"):
            LoRAPre([("q_proj", a), ("k_proj", a)], rank=2)
        with pytest.raises(ConfigError, match="appears twice"):
            LoRAPre([a, a], rank=2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        LoRAPre([{"params": [("q_proj", a)]}, {"params": [("k_proj", a)]}], rank=2)


def test_tied_parameters_are_stepped_once():
    model, wanted = Toy(), Toy()
    for m in (model, wanted):
        m.tied_proj = nn.Linear(8, 12, bias=False)
        m.tied_proj.weight = m.q_proj.weight
    optimizer, oracle = LoRAPre(model.named_parameters(), **STABLE), Reference(wanted.named_parameters(), **STABLE)
    train(model, optimizer)
    train(wanted, oracle)
    assert_matches(model, wanted, FP64)
    assert set(optimizer.factors()) == LOW_RANK


def test_names_of_a_compiled_model_are_those_of_the_model():
    """State is interchangeable, and the initial factors are the same."""
    model, plain = Toy(), Toy()
    compiled = torch.compile(model, backend="eager")
    names = [n for n, _ in compiled.named_parameters()]
    assert all(n.startswith("_orig_mod.") for n in names)
    optimizer, other = LoRAPre(compiled.named_parameters(), **STABLE), LoRAPre(plain.named_parameters(), **STABLE)
    assert set(optimizer.factors()) == LOW_RANK
    train(model, optimizer, range(3))
    train(plain, other, range(3))
    assert_same(model, plain)
    other.load_state_dict(optimizer.state_dict())


def test_nothing_but_a_model_tensors_or_pairs_is_taken():
    with pytest.raises(TypeError):
        LoRAPre("model", **STABLE)
    with pytest.raises(ValueError, match="empty parameter list"):
        LoRAPre([], **STABLE)


# initial factors -----------------------------------------------------------------------------------------------------


def initial_factors(named, **options):
    optimizer = LoRAPre(named, **{**STABLE, **options})
    return {(n, k): t.clone() for n, f in optimizer.factors().items() for k, t in f.items()}


def test_initial_factors_depend_on_seed_and_name_only():
    torch.manual_seed(1)
    first = initial_factors(Toy().named_parameters())
    torch.manual_seed(2)
    torch.randn(17)
    named = list(Toy(torch.float32, seed=5).named_parameters())[::-1]
    second = initial_factors(named)
    grouped = initial_factors([{"params": named[:4]}, {"params": named[4:], "lr": 7.0}])
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key].double(), rtol=0, atol=1e-7)  # one is in fp64
        assert torch.equal(grouped[key], second[key])


def test_initial_factors_do_not_touch_the_global_generator():
    model = Toy()
    state = torch.random.get_rng_state()
    initial_factors(model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_initial_factors_differ_by_seed_name_and_moment_and_have_the_stated_spread():
    parameters = [("a.q_proj", nn.Parameter(torch.zeros(64, 4096))), ("b.q_proj", nn.Parameter(torch.zeros(64, 4096)))]
    options = {"rank": 8, "rank_v": 8, "init_std": 0.05, "variant": "paper"}
    one, other = initial_factors(parameters, **options), initial_factors(parameters, **options, seed=1)
    a, b, v, seeded = one["a.q_proj", "m_A"], one["b.q_proj", "m_A"], one["a.q_proj", "v_A"], other["a.q_proj", "m_A"]
    # 32768 normal draws: the sample's spread is within 2% of 0.05, its mean and correlations within 5 / sqrt(n).
    for t in (a, b, v, seeded):
        assert abs(t.std() / 0.05 - 1) < 0.02
        assert abs(t.mean()) < 0.05 * 5 / 181
    for x, y in ((a, b), (a, v), (a, seeded)):
        assert abs((x * y).mean()) / 0.05**2 < 5 / 181
    for name in ("m_B", "v_B"):
        assert one["a.q_proj", name].count_nonzero() == 0


def test_initial_factors_of_stable_have_orthonormal_rows():
    factors = initial_factors([("q_proj", nn.Parameter(torch.zeros(64, 96)))], rank=8, rank_v=2)
    for name, r in (("m_A", 8), ("v_A", 2)):
        A = factors["q_proj", name]
        torch.testing.assert_close(A @ A.T, torch.eye(r), rtol=0, atol=2e-4)  # the damping's 1e-4
    for name in ("m_B", "v_B", "rms_row"):
        assert factors["q_proj", name].count_nonzero() == 0


def test_factors_have_the_stated_shapes_and_are_the_state_itself():
    optimizer = LoRAPre(Toy().named_parameters(), rank=4, rank_v=2)
    shapes = {k: tuple(t.shape) for k, t in optimizer.factors()["down_proj.weight"].items()}
    assert shapes == {"m_B": (8, 4), "m_A": (4, 17), "v_B": (8, 2), "v_A": (2, 17), "rms_row": (8,)}
    optimizer.factors()["mlp.w"]["m_B"].fill_(3.0)
    assert (optimizer.factors()["mlp.w"]["m_B"] == 3).all()
    paper = LoRAPre(Toy().named_parameters(), **PAPER)
    assert set(paper.factors()["mlp.w"]) == {"m_B", "m_A", "v_B", "v_A"}
