"""What every peer is given, and how it is timed. Imported in the child process only; the parent stays light (see bench.py).

The clock starts after all imports. Evaluations on the reported images that a peer makes after its epochs are off the clock,
because a user who only wants the network would not make them: a point (seconds, accuracy) says after how many seconds the
accuracy would have been known if the run had evaluated there and nowhere before. So its seconds are the training up to there
plus that one evaluation.
"""
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

# Processes that decode images for a DataLoader. With two cores, two were not slower than one or none for any peer.
WORKERS = int(os.environ.get("BENCH_WORKERS", 2))


class Bench:
    "The stopwatch of one run, and the points it has collected."

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.off, self.points = clock, 0., []
        self.begun = clock()

    def seconds(self) -> float:
        "On the clock so far."
        return self.clock() - self.begun - self.off

    @contextmanager
    def evaluation(self):
        "The block is off the clock, except in the points that are recorded in it."
        began, before = self.clock(), self.off
        try:
            yield
        finally:
            self.off = before + self.clock() - began

    def point(self, accuracy: float, kind: str = "epoch") -> None:
        self.points.append({"seconds": round(self.seconds(), 3), "accuracy": float(accuracy), "kind": kind})

    def watch(self, owner: object, name: str, accuracy: Callable[[object], float | None]) -> None:
        "From now on `owner.name(...)` is an evaluation; `accuracy(what it returned)` is its result, None for none."
        method = getattr(owner, name)
        def timed(*args, **kwargs):
            with self.evaluation():
                out = method(*args, **kwargs)
                if (found := accuracy(out)) is not None:
                    self.point(found)
                return out
        setattr(owner, name, timed)


def lite0(classes: int):
    "timm's tf_efficientnet_lite0 with the bundled ImageNet weights and a new head: what every peer starts from."
    from sft_course.tools.opening import open_backbone
    model = open_backbone("lite0").model
    model.reset_classifier(classes)
    return model


def seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def resident() -> dict[str, int]:
    "Bytes of this process now: all that is resident, and what of it is no file's page (those can be dropped at any time)."
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {k: int(status[v].split()[0]) * 1024 for k, v in (("all", "VmRSS"), ("anonymous", "RssAnon"))}


def peak_bytes(who: str = "self") -> int:
    "The largest resident set of this process so far, or of its largest child (a DataLoader's worker)."
    import resource
    import sys
    usage = resource.getrusage(resource.RUSAGE_SELF if who == "self" else resource.RUSAGE_CHILDREN)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
