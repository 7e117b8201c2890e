"""Which part of a long list of tests runs this time: a few of many, and others after another commit.

The commit decides, so that a run can be repeated, and a machine that tests every commit comes to all of them.
"""
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def commit() -> str:
    "The name of the commit that is checked out; where git cannot say it, a hash of the chapters."
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        chapters = sorted((here.parent / "nbs").rglob("*.ipynb"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in chapters)).hexdigest()


def by_turns(items: Sequence[Item], few: int, key: str | None = None) -> list[Item]:
    "About `few` of the items, in their order; over all keys (by default the commit), each of them as often as another."
    groups = max(1, -(-len(items) // few))
    digest = hashlib.sha256((commit() if key is None else key).encode()).digest()
    return list(items[int.from_bytes(digest[:8], "big") % groups::groups])


def notebooks() -> str:
    "A regular expression for `nbdev-test --file-re`: every chapter, and half of the tools by turns."
    top = Path(__file__).resolve().parent.parent / "nbs"
    chapters, tools = (sorted(path.stem for path in folder.glob("*.ipynb")) for folder in (top, top / "tools"))
    return rf"^({'|'.join(chapters + by_turns(tools, -(-len(tools) // 2)))})\.ipynb$"


if __name__ == "__main__":
    print(notebooks())
