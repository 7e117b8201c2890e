"""What it saves that memory which a training step frees stays with the process (`freed_memory_kept` in nbs/tools/torch_state.ipynb).

`python tests/benchmarks/kept.py` prints a table, `--write` puts it into README.md; run it with nothing else on the machine. Each figure is of a
process of its own, with and without in turn: the step of the default recipe (six stages of the bundled network, batches of 8) on activations in memory.
"""
import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

from marks import write_between

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- kept begin -->", "<!-- kept end -->"
SIZES, BATCH, TURNS, STEPS = (96, 160, 224), 8, 3, 60


def seconds(size: int, kept: bool) -> float:
    "Of a step, in this process."
    import torch
    import torch.nn.functional as F

    from sft_course.backbones import new_head
    from sft_course.tools.opening import open_backbone
    from sft_course.tools.surgery import split_at
    from sft_course.tools.torch_state import freed_memory_kept
    from sft_course.unfreezing import first_trainable, freeze_below, param_groups, training_mode
    net = new_head(open_backbone("lite0"), 6, 0)
    stage = first_trainable(net, 6)
    freeze_below(net, stage)
    training_mode(net, stage, False)
    lower, upper = split_at(net, stage)
    x = lower(torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)).detach()
    y = torch.arange(BATCH) % 6
    optimizer = torch.optim.AdamW(param_groups(net, stage, 1e-4, 1., .01), fused=True)
    spans = []
    with freed_memory_kept() if kept else nullcontext():
        for _ in range(STEPS):
            begun = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(upper(x), y).backward()
            optimizer.step()
            spans.append(time.perf_counter() - begun)
    return median(spans[STEPS // 6:])


def in_a_process(size: int, kept: bool) -> float:
    done = subprocess.run([sys.executable, __file__, "--one", str(size), str(int(kept))], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def table() -> str:
    lines = ["| pixels | as it is, ms | kept, ms | of the time |", "|--:|--:|--:|--:|"]
    for size in SIZES:
        spans = {kept: [] for kept in (False, True)}
        for _ in range(TURNS):
            for kept in spans:
                spans[kept].append(in_a_process(size, kept))
        plain, less = (median(spans[kept]) for kept in (False, True))
        ranges = [f"{1e3 * median(s):.0f} ({1e3 * min(s):.0f} to {1e3 * max(s):.0f})" for s in spans.values()]
        lines.append(f"| {size} | {ranges[0]} | {ranges[1]} | {less / plain:.2f} |")
    import torch
    return "\n".join([*lines, "", f"{torch.get_num_threads()} threads, median (range) of {TURNS} processes; torch "
                      f"{torch.__version__.split('+')[0]}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", nargs=2, type=int, metavar=("PIXELS", "KEPT"))
    given = parser.parse_args()
    if given.one:
        print(seconds(given.one[0], bool(given.one[1])))
    else:
        found = table()
        print(found)
        if given.write:
            write_between(README, BEGIN, END, found)
