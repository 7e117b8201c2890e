"""`sft-course` in a fork of a process that has torch and its like loaded already.

Most of the time of a short command goes into loading them, and the tests run a few hundred commands. The library itself is loaded by each
command anew. Run as a program this file is the process that forks; `Warm` is its other end.
"""
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOADED = ("torch", "torch._dynamo", "torchvision", "timm", "scipy.stats", "sklearn.linear_model", "sklearn.model_selection", "pandas",
          "matplotlib.figure", "matplotlib.pyplot", "seaborn", "typer", "safetensors.torch", "fastcore.all", "tqdm.auto")
OURS = ("SFT_", "XDG_")  # variables that only the library reads, when a command runs


class Warm:
    "Runs commands in forks of one warm process, which starts with the first command."

    def __init__(self):
        self.server = None

    def takes(self, env: dict[str, str] | None) -> bool:
        "Whether an environment differs from ours in nothing that is read before the fork."
        if not hasattr(os, "fork") or sys.platform != "linux":
            return False
        changed = {k for k in {*os.environ, *(env or os.environ)} if os.environ.get(k) != (env or os.environ).get(k)}
        return all(k.startswith(OURS) for k in changed)

    def run(self, args: list[str], cwd: str | None, env: dict[str, str] | None, timeout: float,
            load: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        "What `subprocess.run` gives back for `sft-course` with these arguments; load: what else is to be loaded beforehand."
        if self.server is None:
            self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with tempfile.TemporaryDirectory() as folder:
            asked = {"args": args, "cwd": str(cwd or os.getcwd()), "env": dict(env or os.environ), "folder": folder, "timeout": timeout, "load": load}
            self.server.stdin.write(json.dumps(asked) + "\n")
            self.server.stdin.flush()
            status = json.loads(self.server.stdout.readline())
            if status is None:
                raise subprocess.TimeoutExpired(args, timeout)
            out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(["sft-course", *args], status, out, err)

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()


def child(asked: dict) -> None:
    "The command itself: streams, folder and environment as asked, then what the console script calls."
    streams = [(0, os.devnull, os.O_RDONLY)]
    streams += [(fd, os.path.join(asked["folder"], name), os.O_WRONLY | os.O_CREAT) for fd, name in ((1, "out"), (2, "err"))]
    for fd, path, how in streams:
        opened = os.open(path, how, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, encoding="utf-8", closefd=False) for fd, mode in enumerate("rww"))
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = ["sft-course", *asked["args"]]
    status = 1
    try:
        from sft_course.tools.cli import main
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, timeout: float) -> int | None:
    "The exit status of a child, negative for a signal; None if it had to be killed."
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def serve() -> None:
    "Fork once for each line of standard input; say how each ended."
    for name in LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        for name in asked["load"]:
            importlib.import_module(name)
        pid = os.fork()
        if not pid:
            child(asked)
        print(json.dumps(ended(pid, asked["timeout"])), flush=True)


if __name__ == "__main__":
    serve()
