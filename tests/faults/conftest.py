"""The table of faults. Every test here counts what it tried under the name of a fault; the run ends with one table of them.

    def test_it(fault):
        with fault("power cut") as f:          # one try; it survived if the block ends without an exception
            ...
            f.said(sentence)                   # optional: the sentence that a person was told, as an example for the table of messages
        fault.count("bit flips", survived=ok, message=sentence)     # where one test tries many at once
        fault.skip("no permission", "why it cannot be tried here")

"Lost" are tries that did not survive; the test fails then, too. Surviving means: the run went on and named what it went on without, or
stopped with one sentence, and nothing that was sound before was lost.

FAULTS=long runs ten times as many (`times`, a fixture, is 10 instead of 1). FAULTS_MESSAGES=FILE writes an example sentence for each fault.
"""
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from forks import Forks, pictures


@dataclass
class Row:
    "What became of one fault."
    tried: int = 0
    survived: int = 0
    skipped: str = ""
    messages: list = field(default_factory=list)


ROWS: dict[str, Row] = {}


class Try:
    "One try of a fault, inside `with fault(name) as f`."
    def __init__(self):
        self.message = ""

    def said(self, message):
        self.message = str(message)


class Fault:
    "What the fixture `fault` returns."
    @contextmanager
    def __call__(self, name):
        one = Try()
        try:
            yield one
        except pytest.skip.Exception as e:
            self.skip(name, str(e))
            raise
        except BaseException:
            self.count(name, False, one.message)
            raise
        self.count(name, True, one.message)

    def count(self, name, survived, message=""):
        row = ROWS.setdefault(name, Row())
        row.tried += 1
        row.survived += bool(survived)
        if message and message not in row.messages:
            row.messages.append(message)

    def skip(self, name, why):
        ROWS.setdefault(name, Row()).skipped = why


@pytest.fixture
def fault():
    return Fault()


@pytest.fixture(scope="session")
def times():
    "How many times as many random faults are to be tried."
    return 10 if os.environ.get("FAULTS") == "long" else 1


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    "A process that forks one child for each run."
    f = Forks(tmp_path_factory.mktemp("said"))
    yield f
    f.end()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    "Images that those runs learn from."
    return pictures(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def measured():
    """Run a Python snippet in a process of its own and return it done; the last line of its output is by how many MB its memory grew.

    user: a user id to run as; its rights are given up only after the imports, for it may not be allowed to read the library.
    """
    def run(code, *args, user=None, timeout=300, env=None):
        before = "import os, sys, tqdm.auto, numpy as np, PIL.Image, sft_course.tools.intake, sft_course.tools.problems\n"
        before += "PIL.Image.init()\n" + PEAK + "first = peak()\n"
        if user is not None:
            before += f"os.setgroups([]); os.setgid({user}); os.setuid({user})\n"
        command = [sys.executable, "-c", before + code + "\nprint(round(peak() - first))\n", *map(os.fspath, args)]
        return subprocess.run(command, capture_output=True, text=True, errors="backslashreplace", timeout=timeout, env=env)
    return run


# Linux counts the memory of the process that started this one into ru_maxrss; VmHWM is this process's own.
PEAK = """
def peak():
    "Peak memory of this process in MB."
    import resource
    try: return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
"""


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    wide = max(map(len, ROWS))
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':{wide}}  tried  survived  lost")
    for name, r in ROWS.items():
        why = f"  (skipped: {r.skipped})" if r.skipped else ""
        terminalreporter.write_line(f"{name:{wide}}  {r.tried:5}  {r.survived:8}  {r.tried - r.survived:4}{why}")
    tried, survived = sum(r.tried for r in ROWS.values()), sum(r.survived for r in ROWS.values())
    terminalreporter.write_line(f"{'all':{wide}}  {tried:5}  {survived:8}  {tried - survived:4}")
    if file := os.environ.get("FAULTS_MESSAGES"):
        rows = [(n, re.sub(r"([|<])", r"\\\1", min(r.messages, key=len))) for n, r in ROWS.items() if r.messages]
        lines = ["| fault | what is said, for example |", "|---|---|", *(f"| {n} | {m} |" for n, m in rows)]
        Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
