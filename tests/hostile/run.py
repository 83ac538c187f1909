"""Damage files, let their reader read them, and judge what it says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

from tests.hostile.readers import Reader

#: Messages are for people; a name of thousands of characters may stand in one once.
LONGEST_MESSAGE = 8000


class HostileFiles:
    """The files of a reader in a folder of their own, each case with fresh damage."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._kept = tempfile.TemporaryDirectory()
        self.folder = Path(self._kept.name)
        self.reader.write(self.folder)
        self.whole = {name: (self.folder / name).read_bytes() for name in reader.files}
        self.reader.read(self.folder)

    def try_case(self, dice: Random) -> bool:
        """Whether files with damage drawn by chance were read; if not, they were refused in a clear way.

        Raises:
            AssertionError: the result is wrong, or the error is not a clear one.
        """
        for name, data in self.whole.items():
            (self.folder / name).write_bytes(data)
        name = dice.choice(list(self.whole))
        (self.folder / name).write_bytes(self.reader.files[name](self.whole[name], dice))
        try:
            self.reader.read(self.folder)
        except self.reader.errors as error:
            self._check_message(str(error))
            return False
        return True

    def _check_message(self, message: str) -> None:
        assert len(message) < LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}…"
        named = [name.rpartition("/")[2] for name in self.whole]
        assert (
            str(self.folder) in message
            or any(name in message for name in named)
            or message.startswith(("the plan", "site "))
        ), message
        assert ";" in message or "expected" in message, message

    def close(self) -> None:
        """Remove the folder."""
        self._kept.cleanup()
