"""Hypothesis profiles, the thread count and the device for the whole suite."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import devices
from tests.ranks.pair import end_pair


@pytest.fixture(scope="session", autouse=True)
def _ended_ranks() -> Iterator[None]:
    yield
    end_pair()


# Not tests. Collected for their doctests, the mutants would be listed a second time, and the
# stranger's script would register its rule in the process of the tests.
collect_ignore = ["mutants", "packaging/stranger.py"]

# Tiny steps on two threads are many times slower than on one.
torch.set_num_threads(1)


# Other libraries, processes and the compiler: more than a quarter of the suite's time.
_INTEGRATIONS = {"compile", "families", "integrations", "ranks"}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        top, *folders = item.path.relative_to(item.config.rootpath).parts
        in_file = "compile" in item.path.stem
        if top == "tests" and (in_file or _INTEGRATIONS.intersection(folders)):
            item.add_marker(pytest.mark.integration)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the suite's core runs (default: cpu)")


def pytest_collection_finish() -> None:
    # What has been imported stays: the collector need not go through it again in every test.
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name} needs a GPU that torch can use: there is none")
    devices.use(name)


_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=_SLOW_IS_FINE,
)
# Where a step takes long because it is small: on a GPU.
settings.register_profile("quick", settings.get_profile("fixed"), max_examples=15)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
