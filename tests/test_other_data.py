"The chapters run on a reader's own pictures too: what holds only for Blooms steps aside."
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent


def test_chapters_run_on_a_folder_of_photographs(photos, cache):
    command = [Path(sys.executable).parent / "nbdev-test", "--n-workers", "2", "--file-re", "^0[0-4]_", "nbs"]
    env = os.environ | {"SFT_COURSE_DATASET": str(photos), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    env.pop("SFT_STRICT", None)
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Success" in done.stdout + done.stderr
