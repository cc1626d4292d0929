"""The torch.optim door on one device: exactness, every way to call it, and everything it refuses."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, LoRAPreConfig, reference
from lorapre_dist.core.factors import initial_At

STEPS = 20
# fp64: 20 steps of sums in another order, amplified by the damped solves.
FP64 = 1e-10
# fp32: the contract of the project.
FP32 = 1e-5
STABLE = {"rank": 4, "lr": 0.01, "scale": 0.5}
PAPER = {"rank": 3, "lr": 0.001, "variant": "paper", "damping": 1e-3}


class Toy(nn.Module):
    """Embedding, norm, biases, a head, and four matrices of which one is too small for rank 4; tall and wide."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.q_proj = nn.Linear(8, 12, bias=True)
        self.k_proj = nn.Linear(12, 3, bias=False)
        self.up_proj = nn.Linear(3, 17, bias=False)
        self.down_proj = nn.Linear(17, 8, bias=True)
        self.mlp = nn.ParameterDict({"w": nn.Parameter(torch.zeros(8, 6)), "scale": nn.Parameter(torch.zeros(8))})
        self.head = nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        x = self.down_proj(torch.tanh(self.up_proj(self.k_proj(torch.tanh(self.q_proj(x))))))
        return self.head((x * self.mlp["scale"].exp()) @ self.mlp["w"])


LOW_RANK = {"q_proj.weight", "down_proj.weight", "mlp.w"}  # min(p, q) > 4: 12 x 8, 8 x 17, 8 x 6


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (6, 5), generator=generator)
    targets = torch.randint(5, (6, 5), generator=generator)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten())


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


class Reference:
    """The same training with the dense reference: one state per parameter, fp64, stepped one by one."""

    def __init__(self, named, dtype=torch.float64, **options):
        self.named, self.dtype = dict(named), dtype
        self.config = LoRAPreConfig(**options)
        self.states, self.overrides = {}, {}

    def step(self):
        for name, p in self.named.items():
            if p.grad is None:
                continue
            config = replace(self.config, **self.overrides.get(name, {}))
            matrix = name in LOW_RANK and config.rank > 0
            if name not in self.states:
                self.states[name] = self._initial(name, p, config, matrix)
            update = reference.lorapre_adam_step if matrix else reference.adamw_step
            update(p.data, p.grad.to(p.dtype), self.states[name], config)

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None

    def _initial(self, name, p, config, matrix):
        if matrix:
            m_A, v_A = (
                initial_At(name, moment, p.shape[1], r, config.init_std, config.seed).T
                for moment, r in (("m", config.rank), ("v", config.resolved_rank_v))
            )
            return reference.init_state(tuple(p.shape), config, m_A, v_A)
        zeros = torch.zeros_like(p.data)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros((), dtype=torch.int64)}


def assert_matches(model, wanted, tolerance):
    named = dict(wanted.named_parameters())
    for name, p in model.named_parameters():
        want = named[name].detach().double()
        error = float((p.detach().double() - want).norm() / want.norm())
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_same(model, other):
    """Bit for bit."""
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def state_tensors(optimizer):
    return {(b.piece.name, k): t for b in optimizer.bound() for k, t in b.state.tensors().items()}


# against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        STABLE,
        {**STABLE, "rank_v": 2, "weight_decay": 0.1, "residual": 0.7, "betas": (0.8, 0.95), "eps": 1e-5},
        {**STABLE, "gammas": (0.2, 0.1), "init_std": 0.5, "damping": 1e-2, "seed": 7, "max_update": 0.7},
        PAPER,
        {**PAPER, "rank_v": 1, "residual": 0.2, "weight_decay": 0.1},
    ],
    ids=["stable", "stable-options", "stable-more", "paper", "paper-options"],
)
def test_equals_the_reference_in_fp64(options):
    model, wanted = Toy(), Toy()
    train(model, LoRAPre(model.named_parameters(), **options))
    train(wanted, Reference(wanted.named_parameters(), **options))
    assert_matches(model, wanted, FP64)


def test_equals_the_reference_in_fp32():
    """On the same gradients: the reference's own path through the model would differ by the forward's rounding."""
    model, wanted = Toy(torch.float32), Toy()
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        q.data.copy_(p.data)
    optimizer, oracle = LoRAPre(model.named_parameters(), **STABLE), Reference(wanted.named_parameters(), **STABLE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        oracle.step()
    assert_matches(model, wanted, FP32)


def test_state_equals_the_references():
    model, wanted = Toy(), Toy()
    optimizer, oracle = LoRAPre(model.named_parameters(), **STABLE), Reference(wanted.named_parameters(), **STABLE)
    train(model, optimizer)
    train(wanted, oracle)
    assert set(optimizer.factors()) == LOW_RANK
    for bound in optimizer.bound():
        state = oracle.states[bound.piece.name]
        assert bound.state.step == int(state["step"]) == STEPS
        for name, tensor in bound.state.tensors().items():
            want = state[name].reshape(tensor.shape)
            assert (tensor - want).norm() <= FP64 * want.norm(), (bound.piece.name, name)


@pytest.mark.parametrize("memory", [{"block": 64}, {"block": 1}, {"bucket": 1}, {"block": 300, "bucket": 2000}])
def test_sizes_of_blocks_and_buckets_change_nothing(memory):
    model, wanted = Toy(), Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    optimizer.memory = replace(optimizer.memory, **memory)
    train(model, optimizer)
    train(wanted, LoRAPre(wanted.named_parameters(), **STABLE))
    assert_matches(model, wanted, FP64)


@pytest.mark.parametrize("options", [STABLE, PAPER], ids=["stable", "paper"])
def test_parameters_without_gradient_are_skipped(options):
    """In some steps only, each with its own step count; one never gets any."""
    model, wanted = Toy(), Toy()
    options = {**options, "weight_decay": 0.1}
    optimizer, oracle = LoRAPre(model.named_parameters(), **options), Reference(wanted.named_parameters(), **options)
    untouched = model.norm.weight.detach().clone()
    for step in range(STEPS):
        for m, o in ((model, optimizer), (wanted, oracle)):
            o.zero_grad()
            loss_of(m, step).backward()
            m.norm.weight.grad = None
            if step % 3 == 0:
                m.q_proj.weight.grad = m.q_proj.bias.grad = None
            if step < 5:
                m.down_proj.weight.grad = None
            o.step()
    assert_matches(model, wanted, FP64)
    assert torch.equal(model.norm.weight, untouched)
    steps = {b.piece.name: b.state.step for b in optimizer.bound()}
    assert (steps["q_proj.weight"], steps["down_proj.weight"], steps["mlp.w"], steps["norm.weight"]) == (13, 15, 20, 0)


def test_no_gradient_at_all_is_a_step_that_changes_nothing():
    model, before = Toy(), Toy()
    optimizer = LoRAPre(model.named_parameters(), weight_decay=0.5, **STABLE)
    optimizer.step()
    assert_same(model, before)
    assert not any(b.state.step for b in optimizer.bound())


def test_frozen_parameters_have_no_state_and_may_thaw():
    model, wanted = Toy(), Toy()
    for m in (model, wanted):
        m.q_proj.weight.requires_grad_(False)
        m.norm.bias.requires_grad_(False)
    optimizer, oracle = LoRAPre(model.named_parameters(), **STABLE), Reference(wanted.named_parameters(), **STABLE)
    train(model, optimizer, range(5))
    train(wanted, oracle, range(5))
    assert {b.piece.name for b in optimizer.bound()}.isdisjoint({"q_proj.weight", "norm.bias"})
    for m in (model, wanted):
        m.q_proj.weight.requires_grad_(True)
    train(model, optimizer, range(5, STEPS))
    train(wanted, oracle, range(5, STEPS))
    assert_matches(model, wanted, FP64)


def test_a_parameter_frozen_after_backward_still_steps():
    """As in torch.optim: what counts is the gradient."""
    model, wanted = Toy(), Toy()
    optimizer, oracle = LoRAPre(model.named_parameters(), **STABLE), Reference(wanted.named_parameters(), **STABLE)
    for m, o in ((model, optimizer), (wanted, oracle)):
        loss_of(m, 0).backward()
        m.mlp["w"].requires_grad_(False)
        o.step()
    assert_matches(model, wanted, FP64)


# memory formats and dtypes ---------------------------------------------------------------------------------------


def test_parameters_and_gradients_that_are_not_contiguous():
    model, wanted = Toy(), Toy()
    for m in (model.q_proj, model.down_proj):
        m.weight.data = m.weight.data.t().contiguous().t()
    model.embed.weight.data = torch.cat([model.embed.weight.data, torch.zeros(11, 3)], dim=1)[:, :8]
    assert not any(m.weight.is_contiguous() for m in (model.q_proj, model.down_proj, model.embed))
    storage = model.q_proj.weight.data_ptr()
    optimizer, oracle = LoRAPre(model.named_parameters(), **STABLE), Reference(wanted.named_parameters(), **STABLE)
    for step in range(STEPS):
        for m, o in ((model, optimizer), (wanted, oracle)):
            o.zero_grad()
            loss_of(m, step).backward()
            if m is model:
                m.mlp["w"].grad = m.mlp["w"].grad.t().contiguous().t()
            o.step()
    assert_matches(model, wanted, FP64)
    assert model.q_proj.weight.data_ptr() == storage  # updated where they are
    assert not model.embed.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_computed_in_fp32(dtype):
    """Each step equals: widen, step in fp32, round once."""
    model = Toy(dtype)
    optimizer = LoRAPre(model.named_parameters(), **STABLE, weight_decay=0.1)
    oracle = None
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        wide = {n: p.detach().double() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(dtype)
        oracle = oracle or Reference((), **STABLE, weight_decay=0.1)
        oracle.named = {n: nn.Parameter(w) for n, w in wide.items()}
        for n, p in model.named_parameters():
            oracle.named[n].grad = p.grad.double()
        oracle.step()
        optimizer.step()
        for n, p in model.named_parameters():
            assert p.dtype == dtype
            want = oracle.named[n].detach()
            # Half a unit in the last place, and the difference between fp32 and fp64 at a tie.
            unit = torch.finfo(dtype).eps * want.abs().clamp(min=torch.finfo(dtype).tiny)
            assert ((p.double() - want).abs() <= 0.5001 * unit + 1e-7).all(), n
    assert {t.dtype for t in state_tensors(optimizer).values()} == {torch.float32}


def test_a_gradient_of_another_dtype_is_widened():
    parameter = nn.Parameter(torch.zeros(8, 9))
    optimizer = LoRAPre([("q_proj", parameter)], rank=2)
    if parameter.grad is None:
        parameter.grad = torch.ones(8, 9)
    optimizer.step()
    assert parameter.dtype == torch.float32
    assert parameter.isfinite().all()


@pytest.mark.parametrize(("dtype", "state"), [(torch.float64, torch.float64), (torch.float32, torch.float32)])
def test_state_is_in_the_parameters_precision(dtype, state):
    optimizer = LoRAPre(Toy(dtype).named_parameters(), **STABLE)
    assert {t.dtype for t in state_tensors(optimizer).values()} == {state}


def test_empty_and_scalar_parameters():
    matrix, empty, scalar = (nn.Parameter(torch.ones(shape)) for shape in ((8, 9), (0, 5), ()))
    optimizer = LoRAPre([("q_proj", matrix), ("empty", empty), ("scalar", scalar)], rank=2, lr=0.1)
    (matrix.sum() + empty.sum() + 2 * scalar).backward()
    optimizer.step()
    torch.testing.assert_close(scalar.detach(), torch.tensor(0.9))


# groups ----------------------------------------------------------------------------------------------------------


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


# parameters: names, duplicates, wrappers -------------------------------------------------------------------------


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
        ({"rank": 4, "target_modules": "nope"}, "^target_modules='nope': matches no 2-D parameter"),
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
    with pytest.raises(ConfigError, match="the default target_modules: matches no 2-D parameter"):
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


def test_nothing_but_tensors_or_pairs_is_taken():
    with pytest.raises(TypeError):
        LoRAPre(Toy(), **STABLE)
    with pytest.raises(ValueError, match="empty parameter list"):
        LoRAPre([], **STABLE)


# initial factors -------------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(tensor, second[key].double(), rtol=0, atol=0)
        assert torch.equal(grouped[key], second[key])


def test_initial_factors_do_not_touch_the_global_generator():
    model = Toy()
    state = torch.random.get_rng_state()
    initial_factors(model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_initial_factors_differ_by_seed_name_and_moment_and_have_the_stated_spread():
    parameters = [("a.q_proj", nn.Parameter(torch.zeros(64, 4096))), ("b.q_proj", nn.Parameter(torch.zeros(64, 4096)))]
    options = {"rank": 8, "rank_v": 8, "init_std": 0.05}
    one, other = initial_factors(parameters, **options), initial_factors(parameters, **options, seed=1)
    a, b, v, seeded = one["a.q_proj", "m_A"], one["b.q_proj", "m_A"], one["a.q_proj", "v_A"], other["a.q_proj", "m_A"]
    # 32768 normal draws: the sample's spread is within 2% of 0.05, its mean and correlations within 5 / sqrt(n).
    for t in (a, b, v, seeded):
        assert abs(t.std() / 0.05 - 1) < 0.02
        assert abs(t.mean()) < 0.05 * 5 / 181
    for x, y in ((a, b), (a, v), (a, seeded)):
        assert abs((x * y).mean()) / 0.05**2 < 5 / 181
    for name in ("m_B", "v_B", "v_row"):
        assert one["a.q_proj", name].count_nonzero() == 0


def test_factors_have_the_stated_shapes_and_are_the_state_itself():
    optimizer = LoRAPre(Toy().named_parameters(), rank=4, rank_v=2)
    shapes = {k: tuple(t.shape) for k, t in optimizer.factors()["down_proj.weight"].items()}
    assert shapes == {"m_B": (8, 4), "m_A": (4, 17), "v_B": (8, 2), "v_A": (2, 17), "v_row": (8,)}
    optimizer.factors()["mlp.w"]["m_B"].fill_(3.0)
    assert (optimizer.factors()["mlp.w"]["m_B"] == 3).all()
    paper = LoRAPre(Toy().named_parameters(), **PAPER)
    assert set(paper.factors()["mlp.w"]) == {"m_B", "m_A", "v_B", "v_A"}


# the interface of torch.optim ------------------------------------------------------------------------------------


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    model, wanted = Toy(), Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    other = LoRAPre(wanted.named_parameters(), **STABLE)
    train(wanted, other, [0, 0, 0])
    assert_same(model, wanted)
    assert other.step() is None


def test_zero_grad_clears_or_zeroes():
    model = Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def lambda_lr(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def one_cycle(optimizer):
    """Also moves beta1, and the coupled refresh rate with it."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS + 1, cycle_momentum=True)


@pytest.mark.parametrize("make", [lambda_lr, cosine, one_cycle])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_schedulers(make, as_tensor):
    model, wanted = Toy(), Toy()
    options = {**STABLE, "lr": torch.tensor(0.01, dtype=torch.float64) if as_tensor else 0.01}
    optimizer, oracle = LoRAPre(model.named_parameters(), **options), Reference(wanted.named_parameters(), **STABLE)
    scheduler = make(optimizer)
    lrs = []
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        lrs.append(float(group["lr"]))
        oracle.config = replace(oracle.config, lr=lrs[-1], betas=group["betas"])
        train(model, optimizer, [step])
        train(wanted, oracle, [step])
        scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == as_tensor
    assert len(set(lrs)) == STEPS
    assert_matches(model, wanted, FP64)


def test_a_schedulers_settings_per_group():
    model = Toy()
    named = dict(model.named_parameters())
    rest = [(n, p) for n, p in named.items() if n != "mlp.w"]
    optimizer = LoRAPre([{"params": rest}, {"params": [("mlp.w", named["mlp.w"])], "lr": 0.5}], **STABLE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1.0, lambda s: 0.0 if s else 1.0])
    train(model, optimizer, [0])
    scheduler.step()
    still, moving = model.mlp["w"].detach().clone(), model.q_proj.weight.detach().clone()
    train(model, optimizer, [1])
    assert torch.equal(model.mlp["w"], still)
    assert not torch.equal(model.q_proj.weight, moving)


def test_step_hooks_run():
    model, calls = Toy(), []
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    optimizer.register_step_pre_hook(lambda *_: calls.append(("pre", model.q_proj.weight.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("post", model.q_proj.weight.detach().clone())))
    train(model, optimizer, [0])
    assert [name for name, _ in calls] == ["pre", "post"]
    assert not torch.equal(calls[0][1], calls[1][1])


def test_sparse_gradients_are_refused():
    embed, matrix = nn.Embedding(11, 8, sparse=True), nn.Parameter(torch.zeros(8, 9))
    optimizer = LoRAPre([("embed", embed.weight), ("q_proj", matrix)], rank=2)
    embed(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="sparse gradients"):
        optimizer.step()


def test_a_tensor_put_into_a_group_by_hand_is_refused_if_it_is_not_one_of_ours():
    model = Toy()
    optimizer = LoRAPre(model.named_parameters(), **STABLE)
    train(model, optimizer, [0])
    stranger = torch.zeros(3, requires_grad=True)
    stranger.grad = torch.ones(3)
    optimizer.layout.name = "sharded"
    optimizer.param_groups[0]["params"] = [stranger]
    with pytest.raises(ConfigError, match="not one that LoRAPre was bound to"):
        optimizer.step()


def test_repr_shows_the_settings():
    text = repr(LoRAPre(Toy().named_parameters(), **STABLE))
    assert text.startswith("LoRAPre (")
    assert "rank: 4" in text


# copies and pickles ----------------------------------------------------------------------------------------------


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


# state_dict ------------------------------------------------------------------------------------------------------


def plain(value):
    """Whether ``value`` consists of tensors, numbers, strings, lists and dicts only."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
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
    for name, entry in frozen["state"].items():
        for key, tensor in entry["tensors"].items():
            assert torch.equal(saved["state"][name]["tensors"][key], tensor)
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
        (lambda: {"target_modules": ["q_proj"]}, "group 0: target_modules was None, is"),
        (lambda: {"named": renamed()}, "k2_proj.weight: not in the saved state"),
        (lambda: {"named": renamed()}, "q_proj.weight: saved, but not a parameter here"),
        (lambda: {"named": list(Toy().named_parameters())[1:]}, "embed.weight: saved, but not a parameter here"),
        (lambda: {"model": reshaped()}, r"q_proj.weight: shape was \[12, 8\], is \[13, 8\]"),
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
    del saved["state"]["mlp.w"]["tensors"]["v_row"]
    saved["state"]["q_proj.weight"]["tensors"]["m_B"] = torch.zeros(12, 3)
    with pytest.raises(ConfigError, match=r"mlp.w: v_row was missing, is of shape \(8,\)") as caught:
        optimizer.load_state_dict(saved)
    assert "q_proj.weight: m_B was of shape (12, 3), is of shape (12, 4)" in str(caught.value)


@pytest.mark.parametrize("made", [lambda m: torch.optim.AdamW(m.parameters()).state_dict(), lambda m: {}])
def test_another_optimizers_state_is_refused(made):
    with pytest.raises(ConfigError, match="format None: this version reads format 1"):
        fit().load_state_dict(made(Toy()))


def test_many_differences_are_counted():
    saved = fit().state_dict()
    other = fit(named=[(f"other.{n}", p) for n, p in Toy().named_parameters()])
    with pytest.raises(ConfigError, match=r"\(and \d+ more\)$") as caught:
        other.load_state_dict(saved)
    assert len(str(caught.value)) < 400


def test_state_exists_before_the_first_step():
    """Allocated up front: a checkpoint may be loaded into a fresh optimizer, and memory is known at once."""
    optimizer = LoRAPre(Toy().named_parameters(), **STABLE)
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {n for n, _ in Toy().named_parameters()}
    assert {e["step"] for e in saved["state"].values()} == {0}
    assert saved["state"]["mlp.w"]["kind"] == "lorapre"
    assert saved["state"]["head.weight"]["kind"] == "adamw"


# memory_report ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)])
def test_memory_report_by_hand(dtype, size):
    report = LoRAPre(Toy(dtype).named_parameters(), rank=4, rank_v=2).memory_report()
    matrices = [(12, 8), (8, 17), (8, 6)]
    elements = sum(p * q for p, q in matrices)
    total = sum(p.numel() for p in Toy().parameters())
    state = sum((p + q) * (4 + 2) + p for p, q in matrices) + 2 * (total - elements)
    assert (report.matrices, report.matrix_elements) == (3, elements)
    assert report.adamw_parameters == len(list(Toy().parameters())) - 3
    assert report.adamw_elements == total - elements
    assert report.state_bytes == size * state
    assert report.adamw_state_bytes == size * 2 * total
    assert (report.layout, report.world_size) == ("one device", 1)
    assert report.state_bytes == sum(
        t.numel() * t.element_size()
        for t in state_tensors(LoRAPre(Toy(dtype).named_parameters(), rank=4, rank_v=2)).values()
    )


def test_memory_report_of_paper_has_no_row_energies():
    stable = LoRAPre(Toy().named_parameters(), rank=4, rank_v=4).memory_report()
    paper = LoRAPre(Toy().named_parameters(), rank=4, rank_v=4, variant="paper").memory_report()
    assert stable.state_bytes - paper.state_bytes == 8 * (12 + 8 + 8)


def test_memory_report_reads_well():
    text = str(LoRAPre(Toy().named_parameters(), **STABLE).memory_report())
    assert "one device, state over 1 rank" in text
    assert "3 (280 elements)" in text
    assert len({line.index(line.split("  ")[-1].strip()) for line in text.splitlines()}) <= 2


def test_workspace_does_not_grow_with_the_rows():
    def workspace(p):
        return LoRAPre([("q_proj", nn.Parameter(torch.empty(p, 1024, device="meta")))], rank=32).memory_report()

    assert workspace(2**14).workspace_bytes == workspace(2**20).workspace_bytes
    assert workspace(2**20).workspace_bytes < 64 * 2**20


def peak_transient_bytes(step):
    """Most bytes that ``step`` held at a time beyond what was allocated before, by PyTorch's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1024, 1376)], {"rank": 64}),
        ([(300, 200)] * 12, {"rank": 64, "rank_v": 64}),  # many small matrices in one bucket
        ([(64, 4000), (4000, 64)], {"rank": 16}),
        ([(512, 512)] * 3, {"rank": 32, "variant": "paper"}),
    ],
    ids=["large", "many", "thin", "paper"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_bounds_what_a_step_allocates(shapes, options, dtype):
    named = [(f"{i}.q_proj", nn.Parameter(torch.zeros(shape, dtype=dtype))) for i, shape in enumerate(shapes)]
    optimizer = LoRAPre(named, **options)
    for _, p in named:
        p.grad = torch.randn(p.shape).to(dtype)
    bound = optimizer.memory_report().workspace_bytes
    peak = peak_transient_bytes(optimizer.step)
    assert peak > 0
    assert peak <= bound, f"{peak / 2**20:.2f} MiB, bound {bound / 2**20:.2f} MiB"
