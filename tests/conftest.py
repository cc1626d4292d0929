"""``--exhaustive`` and the end of the ranks that tests share."""

from __future__ import annotations

import os
from unittest import mock

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also run what is marked so: twice the time and more")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether tests that repeat something do so as often as docs/results says."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """Programs that tests call in their own process tell libraries by variables who they are."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def _leave_no_ranks():
    yield
    from tests.distributed.harness import close_pools

    close_pools()
