"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapter_compiler.files import written_beside


def test_what_was_written_replaces_the_file_with_its_companions(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    with written_beside(path) as draft:
        assert draft.name == path.name
        assert not path.exists()
        draft.write_text("new")
        draft.with_name("model.onnx.data").write_text("weights")
    assert path.read_text() == "new"
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), written_beside(path) as draft:
        draft.write_text("half")
        draft.with_name("file.data").write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was written"), written_beside(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []
