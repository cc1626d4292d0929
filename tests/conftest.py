import pytest


@pytest.fixture(scope="session", autouse=True)
def _leave_no_ranks():
    yield
    from tests.distributed.harness import close_pools

    close_pools()
