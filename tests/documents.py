"""Read the documents of the repository: their code blocks and their links."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    text: str


def read_blocks(document: str) -> list[Block]:
    """All fenced code blocks of a document, first to last."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)]


def read_python(document: str) -> str:
    """The python blocks of a document as one program."""
    return "\n".join(block.text for block in read_blocks(document) if block.language == "python")


def find_links(document: str) -> list[str]:
    """Targets of links and pictures that are files of the repository, relative to the document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if "://" not in target]
