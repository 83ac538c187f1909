"""Thousands of damaged files: each is read right, or refused with a clear error; and memory stays bounded."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_compiler.errors import ExportError
from tests.hostile.readers import READERS
from tests.hostile.run import HostileFiles

#: Files in all; see also the drawn ones.
CASES = 1000


@pytest.fixture(scope="module", params=READERS)
def files(request: pytest.FixtureRequest) -> Iterator[HostileFiles]:
    made = HostileFiles(READERS[request.param]())
    yield made
    made.close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(dice=st.randoms(use_true_random=False))
def test_a_drawn_file_is_read_right_or_refused(files: HostileFiles, dice: Random) -> None:
    files.try_case(dice)


def test_a_weight_under_another_name_in_the_description_is_not_left_as_it_was() -> None:
    made = HostileFiles(READERS["fold an ONNX file"]())
    damaged = made.whole["base.onnx"].replace(b'"3.weight": {"aliases"', b'"3.weifht": {"aliases"')
    assert damaged != made.whole["base.onnx"]
    (made.folder / "base.onnx").write_bytes(damaged)
    with pytest.raises(ExportError, match=r"weight 3\.weifht: initializer"):
        made.reader.read(made.folder)
    made.close()


def test_damaged_files_are_read_right_or_refused_within_a_limit_of_memory() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile", "--cases", str(CASES), "--megabytes", "400"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    counts = [re.search(r"(\d+) cases, (\d+) read, (\d+) refused, 0 failed", line) for line in done.stdout.splitlines()]
    assert len(counts) == len(READERS)
    assert all(found is not None for found in counts), done.stdout
    assert sum(int(found[1]) for found in counts if found) == CASES
    # Some damage is harmless, most is not.
    assert all(int(found[2]) > 0 and int(found[3]) > 20 for found in counts if found), done.stdout
