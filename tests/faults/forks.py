"""A process that has imported everything and forks a child for each run: starting Python with torch takes longer than a run here.

`Forks.run(spec)` runs one small fine-tuning in a child and returns what came of it; `Forks.spawn` and `Forks.wait` do it in two
steps, so that the child can be killed in between. A spec is a dict, see `child`. The networks have random weights and the labels of
the images mean nothing: no head is ever perfect, so every phase runs."""

import contextlib
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

NETWORK, SIZE = "test_efficientnet", 48
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def plan(name):
    "Phases: `full` writes six rows of history, `short` three."
    from sft_course import Phase

    many = name == "full"
    return (
        Phase("head", looks_at="last"),
        Phase(3, epochs=3 if many else 1, batch_size=8, views=2 if many else 1),
        Phase("all", epochs=2 if many else 1, batch_size=8, views=0, batch_stats=True),
    )


def pictures(folder, n=24, seed=0):
    "2 · n noisy images in two classes that mean nothing."
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for i in range(2 * n):
        f = folder / ("a", "b")[i % 2] / f"{i:02}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        x = rng.normal(128, 20, (1, 1, 3)) + rng.normal(0, 40, (7, 7, 3)).repeat(8, 0).repeat(8, 1)
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(f)
    return folder


def made(out):
    "What must be the same to the last byte."
    return [hashlib.sha256((out / n).read_bytes()).hexdigest() for n in ("model.safetensors", "history.csv")]


def litter(*folders):
    "Temporary files that are left in folders."
    return sorted(str(p) for d in folders for p in Path(d).rglob(".*") if p.name != ".lock")


# ---- in the child


def child(spec):
    """spec: data, out, cache, said (a file for what came of it); plan, resume, seed, threads; and one fault:
    at: number of a point (see `points`) at which to do `act`, "kill" or "full"; signal: [number, step]; loss: [value, step];
    memory: [kind of error, rows that pass]; hold: seconds to wait after the first row; cli: arguments for `sft-course`; before: code."""
    said = {"ended": "done", "message": "", "points": [], "steps": 0}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            faults(spec, said)
            said |= cli(spec) if "cli" in spec else run(spec)
        except BaseException as e:
            said |= {
                "ended": type(e).__name__,
                "message": str(e),
                "code": getattr(e, "code", None),
                "checkpoint": str(getattr(e, "checkpoint", "")),
            }
    said["seconds"] = time.process_time()
    said["warnings"] = [str(w.message) for w in heard]
    spec["at"] = None
    Path(spec["said"]).write_text(json.dumps(said))


def run(spec):
    import torch

    from sft_course import FineTuner, load_settings

    torch.set_num_threads(spec.get("threads", 1))
    exec(spec.get("before", ""), {})

    def watch(row):
        if spec.get("hold"):
            time.sleep(spec["hold"])

    settings = load_settings(cache=spec["cache"], **spec.get("settings", {}))
    tuner = FineTuner(
        Path(spec["data"]), NETWORK, Path(spec["out"]), size=SIZE, weights=None, seed=spec.get("seed", 0), settings=settings, watch=watch
    )
    result = tuner.run(*plan(spec.get("plan", "full")), resume=spec.get("resume", False))
    finite = all(bool(v.isfinite().all()) for v in result.backbone.model.state_dict().values())
    return {"accuracy": result.accuracy, "notes": result.card["notes"], "history": result.history, "finite": finite}


def cli(spec):
    "`sft-course` with the given arguments, fine-tuning as `run` does."
    import sft_course.recipe as recipe
    from sft_course.tools.cli import main

    def fine_tune(data, out=None, *, settings=None, resume=False, **_):
        return recipe.FineTuner(data, NETWORK, out, size=SIZE, weights=None, seed=0, settings=settings).run(
            *plan(spec["plan"]), resume=resume
        )

    recipe.fine_tune, os.environ["SFT_COURSE_CACHE"] = fine_tune, spec["cache"]
    os.chdir(spec["cwd"])
    sys.argv[1:] = spec["cli"]
    main()


def faults(spec, said):
    import torch

    import sft_course.tools.steps as steps

    usual = steps.add_gradients

    def add_gradients(model, inputs, labels, rows, label_smoothing=0.0, micro=None, precision=None):
        if "memory" in spec and (micro or len(rows)) > spec["memory"][1]:
            raise {
                "MemoryError": MemoryError(),
                "OutOfMemoryError": torch.OutOfMemoryError("out of memory"),
                "RuntimeError": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            }[spec["memory"][0]]
        said["steps"] += 1
        if "signal" in spec and said["steps"] == spec["signal"][1]:
            signal.raise_signal(spec["signal"][0])
        total = usual(model, inputs, labels, rows, label_smoothing, micro, precision)
        if "loss" not in spec or said["steps"] != spec["loss"][1]:
            return total
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(float("nan"))
        return total * float(spec["loss"][0])

    steps.add_gradients = add_gradients
    if "at" in spec:
        points(spec, said)


def points(spec, said):
    """Every place where something is written below `out` or `cache`: a folder made, a file opened, filled, flushed to the disk, renamed.
    said["points"] is the list of those that were passed."""
    import numpy as np
    import torch

    import sft_course.tools.activations as activations
    import sft_course.tools.pixels as pixels

    roots, me, busy = tuple(os.fspath(spec[k]) for k in ("out", "cache")), os.getpid(), []

    def hit(what):
        if busy or os.getpid() != me:
            return False
        said["points"].append(what)
        return len(said["points"]) == spec["at"]

    def act(error=NO_SPACE):
        if spec["act"] == "kill":
            os.kill(me, signal.SIGKILL)
        raise error

    def audit(event, args):
        if event not in ("open", "os.mkdir", "os.rename") or not isinstance(args[0], (str, bytes)):
            return
        path = os.fsdecode(args[0])
        if event == "os.mkdir" and os.path.isdir(path):
            return  # it only says so
        if (
            path.startswith(roots)
            and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            and hit(f"{event} {Path(path).name}")
        ):
            act()

    sys.addaudithook(audit)

    def half(path, whole):
        busy.append(1)
        with open(path, "wb") as f:
            f.write(whole[: len(whole) // 2])
        busy.clear()

    save, write_bytes, np_save, fsync = torch.save, Path.write_bytes, np.save, os.fsync

    def torch_save(what, path):
        if not hit(f"half {Path(path).name}"):
            return save(what, path)
        save(what, whole := io.BytesIO())
        half(path, whole.getvalue())
        act(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 64"))  # what torch says of a full disk

    def bytes_write(path, content):
        if not hit(f"half {path.name}"):
            return write_bytes(path, content)
        half(path, content)
        act()

    def array_save(path, x):
        if not hit(f"half {Path(path).name}"):
            return np_save(path, x)
        np_save(whole := io.BytesIO(), x)
        half(path, whole.getvalue())
        act()

    def flush(fd):
        if hit("fsync"):
            act()
        fsync(fd)

    torch.save, Path.write_bytes, np.save, os.fsync = torch_save, bytes_write, array_save, flush

    class Counted:
        "A file whose first, second and tenth write are points."

        def __init__(self, path, *how):
            self.f, self.n, self.name = open(path, *how), 0, Path(path).name

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.f.close()

        def __getattr__(self, name):
            return getattr(self.f, name)

        def write(self, x):
            self.n += 1
            if self.n in (1, 2, 10) and hit(f"write {self.n} {self.name}"):
                self.f.write(x[: len(x) // 2]), self.f.flush()
                act()
            return self.f.write(x)

    def opened(path, mode="r", *how):
        return Counted(path, mode, *how) if mode == "wb" else open(path, mode, *how)

    pixels.open = activations.open = opened


# ---- the server


def serve():
    import torch

    torch.set_num_threads(1)
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import safetensors.torch  # noqa: F401

    import sft_course.tools.cli  # noqa: F401
    from sft_course.tools.opening import open_backbone

    open_backbone(NETWORK, None)
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                log, code = os.open(asked["said"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 99
                with contextlib.suppress(BaseException):
                    os.dup2(log, 1), os.dup2(log, 2)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    child(asked)
                    code = 0
                os._exit(code)
        print(answer, file=answers, flush=True)


class Forks:
    "The server's other end."

    def __init__(self, temp):
        env = os.environ | {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.temp, self.n = temp, 0
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, what):
        print(json.dumps(what, default=os.fspath), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def spawn(self, **spec):
        self.n += 1
        spec["said"] = str(self.temp / f"said{self.n}.json")
        return self.ask(spec), Path(spec["said"])

    def wait(self, started):
        "What came of it: the dict that the child wrote, or {'ended': 'killed'}."
        code = self.ask({"wait": started[0]})
        if code == -signal.SIGKILL:
            return {"ended": "killed"}
        assert code == 0, (code, Path(f"{started[1]}.log").read_text()[-3000:])
        return json.loads(started[1].read_text()) | {"log": Path(f"{started[1]}.log").read_text()}

    def run(self, **spec):
        return self.wait(self.spawn(**spec))

    def killed_after(self, seconds, **spec):
        "The same, killed by kill -9 once it has used so much time of the processor, which no load of the machine changes."
        started = self.spawn(**spec)
        while (now := used(started[0])) is not None and now < seconds:
            time.sleep(0.002)
        if now is not None:
            os.kill(started[0], signal.SIGKILL)
        return self.wait(started)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def used(pid):
    "Seconds of processor time of a process; None where it has ended."
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/schedstat").read_text() if os.path.exists(f"/proc/{pid}/schedstat") else ""
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state[0] != "Z":
            return max(int(text.split()[0]) / 1e9 if text else 0, (int(state[11]) + int(state[12])) / os.sysconf("SC_CLK_TCK"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    tempfile.tempdir = None
    serve()
