from __future__ import annotations

import pytest

from tests.serving.models import Served, write_files


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Files that tests only read."""
    return write_files(tmp_path_factory.mktemp("serving"))
