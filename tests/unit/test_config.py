"""Settings: defaults of both variants, what is refused and in which words, and the way through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapre_dist import ConfigError, LoRAPreConfig
from lorapre_dist.config.checks import LARGEST, SMALLEST
from lorapre_dist.config.checks import shown as in_words

OPTIONS = [f.name for f in fields(LoRAPreConfig)]


def test_defaults_of_stable():
    config = LoRAPreConfig()
    assert (config.variant, config.rank, config.scale, config.init_std) == ("stable", 128, 0.25, 0.02)
    assert (config.betas, config.eps, config.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert config.resolved_rank_v == 16
    assert config.resolved_residual == 0.9
    assert config.resolved_damping == 1e-4
    assert config.resolved_max_update == 3


def test_defaults_of_paper():
    config = LoRAPreConfig(variant="paper", rank=24)
    assert config.resolved_rank_v == 24
    assert config.resolved_residual == 0
    assert config.resolved_damping == 1e-6
    assert config.resolved_max_update == math.inf


@pytest.mark.parametrize("variant", ["stable", "paper"])
def test_given_values_win_over_the_variants_defaults(variant):
    config = LoRAPreConfig(variant=variant, rank_v=3, residual=0.0, damping=0.5, max_update=2.0, gammas=(0.25, 1.0))
    assert (config.resolved_rank_v, config.resolved_residual, config.resolved_damping) == (3, 0.0, 0.5)
    assert (config.resolved_max_update, config.resolved_gammas) == (2.0, (0.25, 1.0))


def test_rank_v_is_an_eighth_of_the_rank_but_at_least_one():
    assert [LoRAPreConfig(rank=r).resolved_rank_v for r in (1, 7, 8, 15, 16, 512)] == [1, 1, 1, 1, 2, 64]


@given(st.floats(0, 0.9999), st.floats(0, 0.9999))
def test_gammas_are_coupled_to_the_betas(beta1, beta2):
    gamma1, gamma2 = LoRAPreConfig(betas=(beta1, beta2)).resolved_gammas
    # The product of two factors decays by beta1; that of the second moment is squared once more.
    assert math.isclose((1 - gamma1) ** 2, beta1, abs_tol=1e-12)
    assert math.isclose((1 - gamma2) ** 4, beta2, abs_tol=1e-12)
    assert LoRAPreConfig(betas=(beta1, beta2), gammas=[gamma1, gamma2]).resolved_gammas == (gamma1, gamma2)


NOT_NUMBERS = ["0.1", None, True, math.nan, math.inf, -math.inf, 10**400, [0.1], {}]
BAD = [
    *[("lr", v, "a number in [0, inf)") for v in (*NOT_NUMBERS, -1e-9)],
    *[("eps", v, "a number in [0, inf)") for v in (*NOT_NUMBERS, -1e-9)],
    *[("weight_decay", v, "a number in [0, inf)") for v in (*NOT_NUMBERS, -0.1)],
    *[("scale", v, "a number in [0, inf)") for v in (*NOT_NUMBERS, -0.25)],
    *[("init_std", v, "a number in (0, inf)") for v in (*NOT_NUMBERS, 0, -0.02)],
    *[("damping", v, "a number in (0, inf)") for v in ("1e-4", True, math.nan, math.inf, 0, -1.0)],
    *[("max_update", v, "a number in (0, inf)") for v in ("1", True, math.nan, math.inf, 0, -1.0)],
    *[("residual", v, "a number in [0, 1]") for v in ("0.3", True, math.nan, -0.1, 1.1)],
    *[("rank", v, "an integer of at least") for v in (-1, 8.0, "8", None, True, [8])],
    *[("rank_v", v, "an integer of at least 1") for v in (0, -1, 8.0, "8", True)],
    *[("seed", v, "an integer of at least 0") for v in (-1, 0.5, "0", None, True)],
    *[("betas", v, "two numbers") for v in (0.9, "ab", None, (0.9,), [0.9, 0.99, 0.999], {"0": 0.9, "1": 0.99})],
    *[("betas", v, "a number in [0, 1)") for v in ((1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), ("0.9", 0.9), (True, 0.9))],
    *[("gammas", v, "two numbers") for v in (0.1, (0.1,), "ab")],
    *[("gammas", v, "a number in (0, 1]") for v in ((0, 0.1), (0.1, 1.5), (0.1, math.nan), [None, 0.1])],
    *[("variant", v, "'stable', 'paper'") for v in ("Stable", "", None, 1, ["stable"])],
    *[("target_modules", v, "not a valid regular expression") for v in ("*q_proj", ["q_proj", "("], ("[",), "a{2,1}")],
    *[("target_modules", v, "a regular expression or a list of names") for v in ([], [""], [1], 7, {"q_proj": 1})],
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda x: repr(x)[:24])
def test_bad_values_are_named_in_one_line_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        LoRAPreConfig.from_params({name: value})
    message = str(caught.value)
    shown = [value] if not isinstance(value, (tuple, list)) else [value, tuple(value), *value]
    assert any(message.startswith(f"{name}={in_words(v)}: ") for v in shown), message
    assert allowed in message
    assert "\n" not in message


def test_rank_zero_is_for_groups_only():
    assert LoRAPreConfig(rank=0).rank == 0
    with pytest.raises(ConfigError, match="rank=0: must be at least 1"):
        LoRAPreConfig.from_params({"rank": 0})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("ranks", "rank"),
        ("learning_rat", None),
        ("weigth_decay", "weight_decay"),
        ("target_module", "target_modules"),
        ("beta", "betas"),
        ("rankv", "rank_v"),
        ("dampening", "damping"),
        ("Residual", "residual"),
        ("zzz", None),
    ],
)
def test_unknown_options_suggest_the_nearest_name(typo, meant):
    with pytest.raises(ConfigError) as caught:
        LoRAPreConfig.from_params({"lr": 0.1, typo: 1})
    message = str(caught.value)
    assert message.startswith(f"unknown LoRAPre option {typo!r}; ")
    assert "\n" not in message
    if meant:
        assert message.endswith(f"did you mean {meant!r}?")
    else:
        assert all(name in message for name in OPTIONS)


def test_a_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_configs_are_immutable_and_hashable():
    config = LoRAPreConfig(betas=[0.9, 0.99], target_modules=["q_proj"])
    with pytest.raises(AttributeError):
        config.rank = 3
    assert hash(config) == hash(replace(config))


finite = {"allow_nan": False, "allow_infinity": False}
names = st.text("abz_.*01", min_size=1, max_size=9).filter(lambda name: "**" not in name and name[0] != "*")
positive = st.floats(SMALLEST, LARGEST, **finite)
valid = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(0, LARGEST) | st.integers(0, 10),
        "betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
        "eps": st.floats(0, 1),
        "weight_decay": st.floats(0, 10),
        "rank": st.integers(1, 10**6),
        "rank_v": st.none() | st.integers(1, 10**6),
        "scale": st.floats(0, 100),
        "variant": st.sampled_from(["stable", "paper"]),
        "residual": st.none() | st.floats(0, 1),
        "damping": st.none() | positive,
        "max_update": st.none() | positive,
        "init_std": positive,
        "gammas": st.none() | st.lists(st.floats(SMALLEST, 1), min_size=2, max_size=2),
        "target_modules": st.none() | names | st.lists(names, min_size=1),
        "seed": st.integers(0, 2**63),
    },
)


@given(valid)
def test_valid_values_are_kept_and_come_back_from_json(params):
    config = LoRAPreConfig.from_params(params)
    for name, value in params.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    assert LoRAPreConfig.from_params(json.loads(json.dumps(asdict(config)))) == config
    assert LoRAPreConfig(**config.as_defaults()) == config


@given(valid, st.sampled_from(OPTIONS), st.text() | st.none() | st.floats() | st.integers() | st.lists(st.floats()))
def test_any_value_is_either_taken_or_refused_in_one_line(params, name, value):
    try:
        config = LoRAPreConfig.from_params({**params, name: value})
    except ConfigError as error:
        assert "\n" not in str(error)
        assert name in str(error)
    else:
        assert all(0 <= gamma <= 1 for gamma in config.resolved_gammas)
        assert config.resolved_rank_v >= 1
        assert config.resolved_damping > 0
        assert config.resolved_max_update > 0
