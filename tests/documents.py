"""Read the documents of the repository: their code blocks, their links, and what they name."""

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


def find_documents() -> list[str]:
    """Every document, as a path below the root."""
    pages = (str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("docs/**/*.md")))
    return ["README.md", "CONTRIBUTING.md", *pages]


def read_text(document: str) -> str:
    """The text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def read_blocks(document: str) -> list[Block]:
    """All fenced code blocks of a document, first to last."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read_text(document), flags=re.MULTILINE | re.DOTALL)
    return [Block(*block) for block in found]


def read_python(document: str) -> str:
    """The python blocks of a document as one program."""
    return "\n".join(block.text for block in read_blocks(document) if block.language == "python")


def find_links(document: str) -> list[str]:
    """Targets of links and pictures that are files of the repository, relative to the document."""
    text = read_text(document)
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if "://" not in target]


def find_code(document: str) -> list[str]:
    """What stands between backticks outside of code blocks, line breaks as spaces."""
    prose = re.sub(r"^```.*?^```$", "", read_text(document), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
