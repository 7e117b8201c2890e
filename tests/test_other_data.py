"""The chapters run on a reader's own images too: what holds only for Blooms steps aside.

Every chapter on every set takes half an hour; `make test` takes one of them by turns, `make test-long` the others.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from course_form import chapters, name_of
from turns import by_turns

REPO = Path(__file__).parent.parent
SETS = REPO.parent / "shared" / "data"
OWN = ("15", "16", "17", "18", "19")  # these bring their own data
CASES = [(data, name_of(path)) for path in chapters() if path.name[:2] not in OWN for data in ("ants_bees", "hands")]
NOW = by_turns(CASES, 1)
MARKED = [pytest.param(*case, marks=[] if case in NOW else pytest.mark.long) for case in CASES]


@pytest.mark.parametrize("data, chapter", MARKED)
def test_a_chapter_runs_on_photographs(data, chapter, cache):
    if not (SETS / data).is_dir():
        pytest.skip("the photographs are not here")
    env = os.environ | {"SFT_COURSE_DATASET": str(SETS / data), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    env.pop("SFT_STRICT", None)  # records are of Blooms; on another data set a chapter says so, and goes on
    command = [Path(sys.executable).parent / "nbdev-test", "--n-workers", "1", f"nbs/{chapter}.ipynb"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Success" in done.stdout + done.stderr
