"""The plan of every fixture is the recorded one: what is read, in which order, and what becomes of it."""

from __future__ import annotations

import pytest

from support.checkpoints import cases
from support.golden_plan import plan_lines, read_golden


@pytest.mark.parametrize("name", sorted(cases()))
def test_plan_is_the_recorded_one(name: str) -> None:
    assert list(plan_lines(name, cases()[name].items)) == read_golden()[name]


def test_every_recorded_plan_has_a_fixture() -> None:
    assert set(read_golden()) == set(cases())
