"""Each kind of adapters is trained once for all tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.adapter_compiler.saving.exchange.models import Case, make_case


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Makes the case of a kind, or returns the one that it has made."""

    @functools.cache
    def find(kind: str, **options: object) -> Case:
        return make_case(kind, tmp_path_factory.mktemp("case"), **options)

    return find
