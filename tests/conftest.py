from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the crew is of CPUs; tests marked gpu start their own processes

import torch
from crew import Crew

torch.set_num_threads(1)  # as in the crew's workers: sums in another order would differ in the last digits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-pairs", action="store_true", help="resume from every layout in every layout, not a choice")
    parser.addoption("--long", action="store_true", help="also what takes half a minute and more, marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if config.getoption("--long") or item.get_closest_marker("long") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Crew]]:
    """`crew(size)`: worker processes of that number, started at first use."""
    crews: dict[int, Crew] = {}
    folder = tmp_path_factory.mktemp("crews")

    def of_size(size: int) -> Crew:
        if size not in crews:
            crews[size] = Crew(size, folder)
        return crews[size]

    yield of_size
    for each in crews.values():
        each.dismiss()
