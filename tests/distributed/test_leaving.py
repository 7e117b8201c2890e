"A process that leaves the group leaves no thread behind: one that holds a tensor of Python's would abort it at its end."
import subprocess
from pathlib import Path

import pytest

from .conftest import command

SCRIPT = """
from pathlib import Path
from sft_course.tools.processes import everywhere, joined

def threads():
    return [t.read_text().strip() for t in Path("/proc/self/task").glob("*/comm") if "gloo" in t.read_text()]

with joined() as me:
    import torch.distributed.nn
    everywhere(True)
    inside = len(threads())
Path(f"rank{me.rank}").write_text(f"{inside > 0} {len(threads())}")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads")
def test_no_thread_of_the_group_outlives_it(tmp_path, place):
    script = tmp_path / "leaves.py"
    script.write_text(SCRIPT, encoding="utf-8")
    start = command(torchrun=2)
    done = subprocess.run([*start[:start.index("-m", 3)], str(script)], env=place, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{r}").read_text(encoding="utf-8") for r in (0, 1)] == ["True 0", "True 0"]
