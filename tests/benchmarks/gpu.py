"""How near the library's training step comes to a bare one on a GPU: `make gpu`, or `python tests/benchmarks/gpu.py`.

Bare: the network, cross-entropy, backward, fused AdamW, on a float batch that lies on the GPU already, the same one again and again.
Ours: epochs of `Phase(…, views=0)` of `FineTuner`: other images in each step, gathered, turned into a new view, normalised; the order shuffled.
Each figure is the best of the repetitions, in images a second.
"""
import argparse
import sys
import time

import torch
import torch.nn.functional as F

from sft_course import FineTuner, Phase, load_settings
from sft_course.backbones import new_head
from sft_course.tools import training
from sft_course.tools.datasets import open_dataset
from sft_course.tools.opening import open_backbone
from sft_course.tools.steps import native_bfloat16
from sft_course.unfreezing import first_trainable, freeze_below, param_groups, training_mode

GRID = [("lite0", 96, 8), ("lite0", 96, 64), ("lite0", 192, 8), ("lite0", 192, 64), ("resnet50", 192, 64)]
TRAIN = "all"


def synchronised():
    torch.cuda.synchronize()
    return time.perf_counter()


def bare(name, size, batch, precision, steps=30, repeats=3):
    "Images a second of the step without anything around it."
    net = new_head(open_backbone(name, "pretrained" if name == "lite0" else None), 6, 0)
    net.model.to("cuda")
    stage = first_trainable(net, TRAIN)
    freeze_below(net, stage)
    training_mode(net, stage, False)
    optimizer = torch.optim.AdamW(param_groups(net, stage, 1e-4, 1., .01), fused=True)
    x = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 6, (batch,), device="cuda")

    def step():
        with torch.autocast("cuda", precision, enabled=precision is not None):
            logits = net.model(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    for _ in range(5):
        step()
    spans = []
    for _ in range(repeats):
        begun = synchronised()
        for _ in range(steps):
            step()
        spans.append(synchronised() - begun)
    return steps * batch / min(spans)


def ours(tuner, batch, train=TRAIN, views=0, epochs=4):
    "Images a second of the engine's epochs, what comes before and between them apart."
    spans, usual = [], training.epoch_sums

    def timed(*args, **how):
        begun = synchronised()
        done = usual(*args, **how)
        spans.append(synchronised() - begun)
        return done

    training.epoch_sums = timed
    try:
        tuner.run_phase(Phase(train, epochs=epochs, lr=1e-4, batch_size=batch, views=views))
    finally:
        training.epoch_sums = usual
    return len(tuner.train) / min(spans)


def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--least", type=float, default=.9, help="the share of the bare step that must be reached where the batch is 64")
    least = options.parse_args().least
    if not torch.cuda.is_available():
        print("gpu.py: torch finds no CUDA GPU on this machine, so nothing was measured; run it where there is one.")
        return
    kind = native_bfloat16("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, images a second\n")
    print("| network | pixels | batch | bare, float32 | bare, bfloat16 | ours | of bare bfloat16 | six stages, kept |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    short = []
    for name, size, batch in GRID:
        floats, halves = bare(name, size, batch, None), bare(name, size, batch, kind)
        net = open_backbone(name, "pretrained" if name == "lite0" else None)
        tuner = FineTuner(open_dataset(load_settings()), net, size=size, settings=load_settings(device="cuda"))
        whole = ours(tuner, batch)
        kept = ours(tuner, batch, train=min(6, len(net.stages) - 2), views=2)
        share = whole / halves
        print(f"| {name} | {size} | {batch} | {floats:,.0f} | {halves:,.0f} | {whole:,.0f} | {share:.2f} | {kept:,.0f} |", flush=True)
        if batch >= 64 and share < least:
            short.append(f"{name} at {size} pixels: {share:.2f}")
    if short:
        sys.exit(f"below {least} of the bare step: {', '.join(short)}")


if __name__ == "__main__":
    main()
