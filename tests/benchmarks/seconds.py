"""Where the seconds of `fine_tune` go: `python tests/benchmarks/seconds.py FOLDER[@SIZE] …` runs the default recipe once on each folder of
labelled images under cProfile, with an empty cache, and prints a table; `--write` puts it into README.md. Imports are not counted. The
folders that `bench.py` prepared lie in out/bench/data.
"""
import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import timm  # noqa: F401  (what is imported late would count as somebody's seconds)
import torch
import torch._dynamo  # noqa: F401
from marks import write_between

from sft_course import fine_tune, load_settings

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- seconds begin -->", "<!-- seconds end -->"

# what a part is called, and the functions that do it: file, name; an indented part lies within the one before
PARTS = [
    ("open the network", [("opening.py", "open_backbone")]),
    ("list and decode the images", [("intake.py", "scan"), ("pixels.py", "decode_once")]),
    ("head: features of every stage, two views", [("fitting.py", "_features")]),
    ("head: cross-validation and fits", [("fitting.py", "_solve_heads")]),
    ("tuning: what the frozen stages make, once", [("fitting.py", "_kept")]),
    ("tuning: steps", [("steps.py", "epoch_sums")]),
    ("– inputs of a step, in the trial through the frozen stages", [("fitting.py", "batch")]),
    ("– forward and backward", [("steps.py", "add_gradients")]),
    ("– AdamW", [("adam.py", "adam")]),
    ("tuning: validation images", [("fitting.py", "_logits_in_turns")]),
    ("test images", [("engine.py", "_test_logits")]),
]


def profiled(folder: str, size: int | None, seed: int) -> tuple[dict[str, float], float]:
    "Seconds of each part, and of the whole."
    with tempfile.TemporaryDirectory() as cache:
        spy, begun = cProfile.Profile(), time.perf_counter()
        spy.runcall(fine_tune, folder, size=size, seed=seed, settings=load_settings().change(cache=cache))
        whole = time.perf_counter() - begun
    stats = pstats.Stats(spy).stats
    def spent(file, name):
        return sum(s[3] for (path, _, function), s in stats.items() if function == name and Path(path).name == file)
    found = {part: sum(spent(*which) for which in functions) for part, functions in PARTS}
    found["– forward and backward"] -= found["– inputs of a step, in the trial through the frozen stages"]
    return found, whole


def table(runs: dict[str, tuple[dict[str, float], float]]) -> str:
    "The parts as Markdown, a column a folder."
    def cells(values):
        return [f"{seconds:.1f} ({100 * seconds / whole:.0f} %)" for seconds, (_, whole) in zip(values, runs.values(), strict=True)]
    lines = ["| seconds | " + " | ".join(runs) + " |", "|---|" + "--:|" * len(runs)]
    for part, _ in PARTS:
        lines.append(f"| {part} | " + " | ".join(cells([found[part] for found, _ in runs.values()])) + " |")
    rest = [whole - sum(s for part, s in found.items() if not part.startswith("–")) for found, whole in runs.values()]
    lines += ["| all else | " + " | ".join(cells(rest)) + " |", "| whole run | " + " | ".join(cells([w for _, w in runs.values()])) + " |"]
    return "\n".join([*lines, "", f"One run each, {torch.get_num_threads()} threads; torch {torch.__version__.split('+')[0]}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER[@SIZE]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    runs, usual = {}, load_settings().fit_image_size
    for text in given.folders:
        folder, _, size = text.partition("@")
        name = Path(folder).resolve().name.partition("-")[0]  # without the hash of a prepared folder
        runs[f"{name}, {size or usual} px"] = profiled(folder, int(size) if size else None, given.seed)
    print(made := table(runs))
    if given.write:
        write_between(README, BEGIN, END, made)
