"""Measurements of our own loop that have no peer: each sets a number of ours beside a reference measured in the same process.

Each function takes the prepared folder, the size, and an empty folder for caches, and returns a dict with `ours` and `reference`.
"""
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from harness import WORKERS, peak_bytes, resident


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tuner_of(folder, size, cache, say=None, **settings):
    from sft_course.tools.engine import FineTuner
    from sft_course.tools.settings import load_settings
    return FineTuner(folder, "lite0", size=size, seed=0, say=say, settings=load_settings(cache=str(cache), **settings))


def upper_phase():
    "The phase of the default recipe that trains more than the head, after its trial."
    from sft_course.recipe import default_phases
    from sft_course.tools.settings import load_settings
    return next(p for p in default_phases(load_settings()) if p.train != "head" and not p.trial)


def head(folder, size, cache):
    """The head phase from files to its first answer (`ours`) and to its end (`whole`), beside decoding every image once and a bare
    forward pass over tensors in memory. Three times each in turn, the medians; opening the network is in neither, listing the files
    in both."""
    import torch

    import sft_course.recipe as recipe
    import sft_course.tools.tuner as tuner_module
    from sft_course.data import decoded_size, plain_view, to_input
    from sft_course.tools.intake import scan
    from sft_course.tools.opening import open_backbone
    from sft_course.tools.pixels import decode_once
    opened = open_backbone("lite0")
    body = open_backbone("lite0").model
    tuner_module.open_backbone = lambda *_: opened

    def ours(place):
        began, first = time.perf_counter(), []
        def say(text): first.extend([time.perf_counter() - began] if "first head" in text else [])
        tuner_of(folder, size, place, say).run_phase(recipe.Phase("head"))
        return first[0], time.perf_counter() - began

    def reference(place):
        began = time.perf_counter()
        pixels = decode_once(scan(folder), decoded_size(size, opened.crop), place).pixels
        spent = time.perf_counter() - began
        for i in range(0, len(pixels), 64):
            some = pixels[i:i + 64]
            x = to_input(some, plain_view(len(some), size / pixels.shape[1]), size, opened.mean, opened.std)
            with torch.inference_mode():
                spent += seconds(lambda x=x: body(x))
        return spent

    mine, theirs = [], []
    for i in range(3):
        mine.append(ours(cache / f"ours{i}"))
        theirs.append(reference(cache / f"reference{i}"))
    first, whole = (median(times) for times in zip(*mine, strict=True))
    return {"ours": first, "whole": whole, "reference": median(theirs), "all_ours": mine, "all_reference": theirs}


def head_epoch(folder, size, cache):
    """One more pass of the head's solver over all training features, beside one epoch of the usual way: read, crop, run the frozen
    network without a graph, step the head. Whole fits of the head are timed (not those of its cross-validation, which see fewer
    images), and their passes counted inside torch's LBFGS."""
    import torch

    import sft_course.recipe as recipe
    import sft_course.tools.fitting as fitting
    passes, fits, step, fit_head = [], [], torch.optim.LBFGS.step, fitting.fit_wide_head
    def counted(solver, closure):
        out = step(solver, closure)
        passes.append(solver.state[solver._params[0]]["func_evals"])
        return out
    def timed(*args, **kwargs):
        passes.clear()
        began = time.perf_counter()
        out = fit_head(*args, **kwargs)
        fits.append((time.perf_counter() - began, sum(passes)))
        return out
    torch.optim.LBFGS.step, fitting.fit_wide_head = counted, timed
    tuner_of(folder, size, cache).run_phase(recipe.Phase("head"))
    spent, count = map(sum, zip(*fits, strict=True))
    return {"ours": spent / count, "passes": count, "reference": frozen_epoch(folder, size)}


def frozen_epoch(folder, size):
    "Seconds of the second of two epochs: the first starts the loader's processes."
    import torch
    from harness import lite0
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms
    train = datasets.ImageFolder(folder / "train", transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize([.5] * 3, [.5] * 3)]))
    loader = DataLoader(train, batch_size=32, shuffle=True, num_workers=WORKERS, persistent_workers=WORKERS > 0)
    body = lite0(0).eval()
    last = torch.nn.Linear(body.num_features, len(train.classes))
    optimizer = torch.optim.SGD(last.parameters(), lr=.01, momentum=.9)
    def epoch():
        for x, y in loader:
            with torch.no_grad():
                features = body(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(last(features), y).backward()
            optimizer.step()
    epoch()
    return seconds(epoch)


def boundary(folder, size, cache, epochs=4):
    """Epochs of the default recipe's upper stages on cached activations, and with a cache too small for any, from the same head on
    the same views. An epoch is from one row of the history to the next, so evaluation on the validation images is in both;
    computing the cache is not.

    Distances between weights are shares of the distance that training went. `apart`: to a third run without the cache, whose
    activations come from the same folded network and are rounded to fp16, as those of the cache: other views, another order or
    other weights would show. `apart_float`: to the second, which does neither (AdamW makes much of small differences)."""
    import sft_course.recipe as recipe
    import sft_course.tools.fitting as fitting
    from sft_course.loop import copy_state
    def run(split_at, **settings):
        ticks, states, split = [], [], fitting.split_at
        tuner = tuner_of(folder, size, cache, **settings).run_phase(recipe.Phase("head"))
        before = copy_state(tuner.backbone.model)
        def watch(row):
            states.append(copy_state(tuner.backbone.model))
            ticks.append(time.perf_counter())
        tuner.watch, fitting.split_at = watch, split_at
        try:
            tuner.run_phase(replace(upper_phase(), epochs=epochs))
        finally:
            fitting.split_at = split
        return median(b - a for a, b in zip(ticks, ticks[1:], strict=False)), before, states[-1]
    plain = fitting.split_at
    def rounding(*args):
        lower, upper = plain(*args)
        return rounded(lower, size), upper
    ours, start, a = run(plain)
    reference, _, b = run(plain, cache_gigabytes=1e-9)
    _, _, c = run(rounding, cache_gigabytes=1e-9)
    def distance(x, y):
        return sum(((x[k] - y[k]).double() ** 2).sum().item() for k in x if x[k].is_floating_point()) ** .5
    return {"ours": ours, "reference": reference, "apart": distance(a, c) / distance(a, start),
            "apart_float": distance(a, b) / distance(a, start)}


def rounded(lower, size):
    import torch

    from sft_course.tools.surgery import fold_batch_norms
    class Half(torch.nn.Module):
        def forward(self, x):
            return x.half().float()
    example = torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    return torch.nn.Sequential(fold_batch_norms(lower, example), Half())


def throughput(folder, size, cache):
    """Images a second with all layers training, from the decoded images to the step, beside the same step (mode, optimiser and
    batch) on tensors already in memory, before and after."""
    import torch

    import sft_course.recipe as recipe
    from sft_course.data import to_input
    from sft_course.tools import training
    from sft_course.unfreezing import freeze_below, param_groups, training_mode
    tuner = tuner_of(folder, size, cache)
    phase, backbone = recipe.Phase("all", epochs=3), tuner.backbone
    x = [to_input(tuner.pixels.pixels[rows], tuner.view(2)[rows], size, backbone.mean, backbone.std)
         for rows in (tuner.train[i:i + phase.batch_size] for i in range(0, min(len(tuner.train), 8 * phase.batch_size), phase.batch_size))
         if len(rows) == min(phase.batch_size, len(tuner.train))]
    y = [torch.arange(len(some)) % len(tuner.catalog.classes) for some in x]
    steps = max(4, len(tuner.train) // phase.batch_size)

    def bare():
        freeze_below(backbone, 0), training_mode(backbone, 0, phase.batch_stats)
        optimizer = torch.optim.AdamW(param_groups(backbone, 0, 1e-6, 1., phase.weight_decay), fused=True)
        def step(i):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(backbone.model(x[i % len(x)]), y[i % len(x)]).backward()
            optimizer.step()
        for i in range(2):
            step(i)
        return sum(len(x[i % len(x)]) for i in range(steps)) / seconds(lambda: [step(i) for i in range(steps)])

    rates, steps_of = [], training._some_steps  # the steps of an epoch, with the making of their batches and nothing else
    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = steps_of(*args, **kwargs)
        rates.append(len(tuner.train) / (time.perf_counter() - began))
        return out
    training._some_steps = timed
    before = bare()
    tuner.run_phase(phase)
    after = bare()
    return {"ours": mean(rates[1:]), "reference": (before + after) / 2, "before": before, "after": after}


def memory(folder, size, cache):
    """Peak memory of the default recipe on a tenth of the data set and on all of it, each in a process of its own and beyond what
    that process held once the network was open. Judged by what is no file's page: pages of mapped files count as resident until
    somebody else needs the room, and the ratio with them is noted beside it."""
    def run(share):
        command = [sys.executable, __file__, str(folder), str(size), str(cache / f"memory-{share}"), str(share)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    few, many = run(10), run(1)
    return {"ours": many["anonymous"], "reference": few["anonymous"], "all_many": many["all"], "all_few": few["all"],
            "many": many["images"], "few": few["images"]}


def _memory_of(folder, size, cache, share):
    import threading

    import numpy as np

    import sft_course.recipe as recipe
    import sft_course.tools.tuner as tuner_module
    from sft_course.tools.intake import scan
    from sft_course.tools.opening import open_backbone
    from sft_course.tools.settings import load_settings
    opened = open_backbone("lite0")
    tuner_module.open_backbone = lambda *_: opened
    catalog = scan(folder)
    keep = np.zeros(len(catalog), bool)
    for group in {(c, p) for c, p in zip(catalog.labels.tolist(), catalog.part.tolist(), strict=True)}:
        rows = np.flatnonzero((catalog.labels == group[0]) & (catalog.part == group[1]))
        keep[rows[:max(2, len(rows) // share)]] = True
    before, peak, done = resident(), {"anonymous": 0}, threading.Event()
    def sample():
        while not done.wait(.005):
            peak["anonymous"] = max(peak["anonymous"], resident()["anonymous"])
    watcher = threading.Thread(target=sample)
    watcher.start()
    settings = load_settings(cache=str(cache))
    tuner = recipe.FineTuner(catalog.keep(keep), "lite0", size=size, seed=0, settings=settings)
    for phase in recipe.default_phases(settings):
        tuner.run_phase(phase)
    tuner.measure()
    done.set()
    watcher.join()
    return {"anonymous": peak["anonymous"] - before["anonymous"], "all": peak_bytes() - before["all"], "images": int(keep.sum())}


def import_time(folder, size, cache):
    "Median of nine fresh processes, each of which has run once before."
    code = "import time; t = time.perf_counter(); import sft_course; print(time.perf_counter() - t)"
    took = [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) for _ in range(10)]
    return {"ours": median(took[1:]), "all_ours": took}


ALL = {"head": head, "head_epoch": head_epoch, "boundary": boundary, "throughput": throughput, "memory": memory, "import": import_time}

if __name__ == "__main__":
    print(json.dumps(_memory_of(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
