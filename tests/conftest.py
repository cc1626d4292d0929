"""``--exhaustive`` and ``--fast``, and the end of the ranks that tests share."""

from __future__ import annotations

import inspect
import os
from itertools import groupby
from unittest import mock

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also run what is marked so: twice the time and more")
    parser.addoption(
        "--fast",
        action="store_true",
        help="leave out what is marked slow, and of each module's tests that run on ranks all but the first, "
        "of which the case in the middle is run",
    )


#: The order in which directories are run: the longest files first, so that no worker waits for another's at the end.
ORDER = ("launch", "deepspeed", "distributed", "planner", "training", "unit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = [item for item in items if config.getoption("--exhaustive") or not item.get_closest_marker("exhaustive")]
    if config.getoption("--fast"):
        found = fast([item for item in found if not item.get_closest_marker("slow")])
    kept = set(found)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(
        found, key=lambda item: ORDER.index(item.path.parent.name) if item.path.parent.name in ORDER else 0
    )


def fast(items: list[pytest.Item]) -> list[pytest.Item]:
    """Without all but one of each module's tests on ranks: its first, in the case in the middle."""
    found = []
    for _, module in groupby(items, key=lambda item: item.path):
        tests = list(module)
        ranked = [item for item in tests if on_ranks(item)]
        cases = [item for item in ranked if item.originalname == ranked[0].originalname]
        left_out = {*ranked} - {cases[len(cases) // 2]} if cases else set()
        found += [item for item in tests if item not in left_out]
    return found


def on_ranks(item: pytest.Item) -> bool:
    """Whether a test runs something on a pool of ranks, itself or through a function of its module."""
    through = {"run_ranks"} | {
        name
        for name, value in vars(item.module).items()
        if inspect.isfunction(value) and "run_ranks" in value.__code__.co_names
    }
    return bool(through & {*item.function.__code__.co_names})


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether tests that repeat something do so as often as docs/results says."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session")
def steps(exhaustive: bool) -> int:
    """After how many steps a run is compared with the reference: 20, as docs/results says, with ``--exhaustive``.

    Otherwise enough for some beyond the tests' schedule of learning rates, which rises for ten.
    """
    return 20 if exhaustive else 12


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """Programs that tests call in their own process tell libraries by variables who they are."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def _leave_no_ranks():
    yield
    from tests.distributed.harness import close_pools
    from tests.forks import kill_all

    close_pools()
    kill_all()
