"A few of many tests at a time, and all of them after some commits."
import re
import subprocess
from pathlib import Path

import pytest
import turns


@pytest.mark.parametrize("many, few", [(9, 3), (28, 2), (5, 2), (1, 3), (23, 4)])
def test_every_item_has_its_turn_and_few_have_it_at_once(many, few):
    items = list(range(many))
    times = [turns.by_turns(items, few, str(key)) for key in range(500)]
    assert all(0 < len(now) <= few and now == sorted(now) for now in times)
    counts = [sum(item in now for now in times) for item in items]
    assert min(counts) > 500 * few / many / 2 or many <= few


def test_the_same_commit_has_the_same_turn(monkeypatch):
    assert turns.by_turns("abcdefgh", 2) == turns.by_turns("abcdefgh", 2)
    seen = set()
    for name in "0123456789":
        monkeypatch.setattr(turns, "commit", lambda name=name: name)
        seen.add(tuple(turns.by_turns("abcdefgh", 2)))
    assert len(seen) > 1


def test_without_git_there_is_a_turn_too(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")
    monkeypatch.setattr(subprocess, "run", missing)
    assert len(turns.commit()) == 64
    assert turns.by_turns("abc", 1) == turns.by_turns("abc", 1)


def test_every_chapter_runs_and_every_tool_has_its_turn(monkeypatch):
    top = Path(turns.__file__).parent.parent / "nbs"
    chapters, tools = ({path.name for path in folder.glob("*.ipynb")} for folder in (top, top / "tools"))
    assert not chapters & tools and len(tools) > 20
    seen = set()
    for name in "0123456789":
        monkeypatch.setattr(turns, "commit", lambda name=name: name)
        now = {name for name in chapters | tools if re.search(turns.notebooks(), name)}
        assert chapters <= now and len(now - chapters) <= len(tools) / 2 + 1
        seen |= now
    assert seen == chapters | tools
