"""What the results say: times to an accuracy, lines of user code, tables and the figure. The parent imports it, so no torch here."""
import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

from marks import write_between

HERE = Path(__file__).parent
MARKS = ("<!-- tables begin -->", "<!-- tables end -->")
ORDER = ["sft", "features", "plain", "fastai", "lightning", "transformers"]
NAMES = {"sft": "sft_course", "features": "features + logistic regression", "plain": "plain loop", "fastai": "fastai `fine_tune`",
         "lightning": "Lightning `BackboneFinetuning`", "transformers": "Hugging Face Trainer"}
TRAINERS = ["plain", "fastai", "lightning", "transformers"]
# Okabe and Ito's colours; ours is the one that "fine-tuned" has in every chapter.
COLOURS = {"sft": "#e69f00", "features": "#0072b2", "plain": "#7a7a7a", "fastai": "#cc79a7", "lightning": "#009e73",
           "transformers": "#d55e00"}


# Times

def mean_curve(runs):
    """[(seconds, accuracy)] of several seeds' [(seconds, accuracy)]: after each moment at which some run knows a new accuracy,
    the mean over runs of the last one known. It begins when every run knows one."""
    begin = max(min(t for t, _ in run) for run in runs)
    moments = sorted({t for run in runs for t, _ in run if t >= begin})
    return [(t, mean(max((p for p in run if p[0] <= t), key=lambda p: p[0])[1] for run in runs)) for t in moments]


def time_to(curve, accuracy):
    """Seconds until the curve is first at `accuracy`; None if it never is. Nothing is interpolated: between two evaluations
    nobody has a network of an accuracy in between. (The tiny allowance is for float32 means.)"""
    return next((t for t, a in curve if a >= accuracy - 1e-5), None)


# Lines of user code

def user_lines(source):
    """How many lines of user code a peer takes: the lines between `# user code begins` and `# user code ends` that hold code.

    Not counted: blank lines, comments, docstrings, and lines that end in `# bench`, which measure."""
    lines = source.splitlines()
    inside, chosen = False, set()
    for n, line in enumerate(lines, 1):
        if line.strip() in ("# user code begins", "# user code ends"):
            inside = line.strip().endswith("begins")
        elif inside and not line.rstrip().endswith("# bench"):
            chosen.add(n)
    return len(chosen & _lines_with_code(source))


def _lines_with_code(source):
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


# Results

def latest(rows):
    "The last row of every measurement: a file that was added to more than once holds older ones before it."
    return list({(r["kind"], r["what"], r["data"], r.get("seed")): r for r in rows}.values())


def by_data(rows):
    "{data set: {peer: its rows}}, peers in the order of the table."
    found = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if r["kind"] == "peer":
            found[r["data"]][r["what"]].append(r)
    return {d: {p: sorted(found[d][p], key=lambda r: r["seed"]) for p in ORDER if p in found[d]} for d in found}


def points(row):
    """[(seconds, accuracy)] of a run, up to what it returned. A point on the way holds the time of its own evaluation, so the last
    of them can lie after the end of a run that needed no evaluation there."""
    found = [(p["seconds"], p["accuracy"]) for p in row["points"]]
    return [p for p in found[:-1] if p[0] < found[-1][0]] + found[-1:]


def at_end(rows, what):
    "The accuracy, or the seconds, with which each run ended."
    return [r["points"][-1][what] for r in rows]


def final(rows): return mean(at_end(rows, "accuracy"))


def best(peers, among):
    "Of the peers `among`, the one with the highest mean final accuracy; None where none was run."
    return max((p for p in among if p in peers), key=lambda p: final(peers[p]), default=None)


def spread(values, digits):
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def mb(values):
    return f"{max(values) / 1e6:.0f}"


def seconds(t): return "never" if t is None else f"{t:.1f}"


def table(head, rows):
    "A Markdown table; the first column is text, the others are numbers."
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["--:"] * (len(head) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def peer_table(peers, lines):
    "The table of one data set: {peer: rows} and {peer: lines of user code}."
    goal = best(peers, [p for p in peers if p != "sft"])
    level = final(peers[goal]) if goal else None
    reached = [f"seconds to {level:.3f}"] if goal else []
    head = ["", "accuracy", "seconds, whole run", *reached, "peak memory, MB (beyond imports)", "lines of user code"]
    out = []
    for p, rows in peers.items():
        reach = [seconds(time_to(mean_curve([points(r) for r in rows]), level))] if goal else []
        out.append([NAMES[p], spread(at_end(rows, "accuracy"), 3),
                    spread(at_end(rows, "seconds"), 1), *reach,
                    f"{mb(r['peak'] for r in rows)} ({mb(r['peak'] - r['before'] for r in rows)})", str(lines[p])])
    return table(head, out)


def judged(name, data, target, value, ok): return [name, data, target, value, "yes" if ok else "**no**"]


def whole_run(data, peers):
    "The row that sets the whole of our run beside that of the trainer that ends first."
    spent = {p: mean(at_end(peers[p], "seconds")) for p in peers}
    first = min((p for p in TRAINERS if p in peers), key=spent.get)
    mine, theirs = final(peers["sft"]), final(peers[first])
    return judged(f"whole run, beside the trainer that ends first ({NAMES[first]})", data, "≤ 1/2 of its, as accurate or more",
                  f"1/{spent[first] / spent['sft']:.1f} ({spent['sft']:.1f} of {spent[first]:.1f} s; accuracy {mine:.3f} and {theirs:.3f})",
                  2 * spent["sft"] <= spent[first] and mine >= theirs - 1e-5)


def ahead(ours, theirs):
    "For a peer that ends ahead: by how much over the seeds that both have run, with the standard error of that."
    here, there = ({r["seed"]: at_end([r], "accuracy")[0] for r in rows} for rows in (ours, theirs))
    gaps = [there[seed] - here[seed] for seed in here if seed in there]
    if len(gaps) < 2 or mean(gaps) <= 0:
        return ""
    return f", ahead by {mean(gaps):.3f} ± {stdev(gaps) / len(gaps) ** .5:.3f} (standard error over seeds)"


def peer_targets(data, peers):
    "Rows of the table of targets that come from the peers' runs on one data set."
    if "sft" not in peers:
        return []
    ours, out = mean_curve([points(r) for r in peers["sft"]]), []
    if (b := best(peers, TRAINERS)):
        level, theirs = final(peers[b]), time_to(mean_curve([points(r) for r in peers[b]]), final(peers[b]))
        mine = time_to(ours, level)
        value = f"never (theirs {theirs:.1f} s)" if mine is None else f"1/{theirs / mine:.1f} ({mine:.1f} of {theirs:.1f} s)"
        out.append(judged(f"time to the best trainer's final accuracy ({NAMES[b]}, {level:.3f})", data, "≤ 1/4 of that trainer's",
                          value, mine is not None and mine * 4 <= theirs))
        out.append(whole_run(data, peers))
    if "features" in peers:
        level, theirs = final(peers["features"]), mean(at_end(peers["features"], "seconds"))
        mine = time_to(ours, level)
        value = f"never (theirs {theirs:.1f} s)" if mine is None else f"{mine / theirs:.2f} × ({mine:.1f} of {theirs:.1f} s)"
        out.append(judged(f"time to the accuracy of features + logistic regression ({level:.3f})", data, "≤ 1.1 × that peer's", value,
                          mine is not None and mine <= 1.1 * theirs))
    others = [p for p in peers if p != "sft"]
    if others:
        top, mine = best(peers, others), final(peers["sft"])
        out.append(judged(f"final accuracy of the default recipe, mean of {len(peers['sft'])} seeds", data, "≥ every peer's",
                          f"{mine:.3f} (best peer {final(peers[top]):.3f}, {NAMES[top]}{ahead(peers['sft'], peers[top])})",
                          mine >= final(peers[top]) - 1e-5))
    if data == "blooms" and "features" in peers:
        gain = final(peers["sft"]) - final(peers["features"])
        out.append(judged("the same over the last layer's linear head (features + logistic regression)", data, "≥ + 0.08",
                          f"{gain:+.3f}", gain >= .08))
    return out


# name: (what the row says, the target in words, the number that is judged from the measurement, how it is shown, whether it is met)
TARGETS = {
    "head": (
        "head phase until its first answer", "≤ 1.1 × (decode once + one bare forward pass)",
        lambda m: m["ours"] / m["reference"],
        lambda v, m: f"{v:.2f} × ({m['ours']:.1f} of {m['reference']:.1f} s; {m['whole']:.1f} s to its end, with the mirror image)",
        lambda v, m: v <= 1.1),
    "head_epoch": (
        "further epochs of the head phase", "≤ 1/300 of a plain frozen epoch",
        lambda m: m["reference"] / m["ours"],
        lambda v, m: f"1/{v:.0f} ({m['ours'] * 1e3:.1f} ms of {m['reference']:.1f} s)",
        lambda v, m: v >= 300),
    "boundary": (
        "top stages on cached boundary activations, an epoch", "≤ 1/3 of the same without the cache, same weights to fp16 rounding",
        lambda m: m["reference"] / m["ours"],
        lambda v, m: f"1/{v:.1f} ({m['ours']:.2f} of {m['reference']:.2f} s); weights apart by {m['apart']:.2%} of the way they moved, "
                     f"{m['apart_float']:.1%} from those of unrounded activations",
        lambda v, m: v >= 3 and m["apart"] <= .01),
    "throughput": (
        "throughput, all layers training, data included", "≥ 0.95 of a bare step on tensors in memory",
        lambda m: m["ours"] / m["reference"],
        lambda v, m: f"{v:.2f} ({m['ours']:.1f} of {m['reference']:.1f} images/s)",
        lambda v, m: v >= .95),
    "memory": (
        "peak memory when the data grow tenfold, beyond the model's own", "≤ 1.1 ×",
        lambda m: m["ours"] / m["reference"],
        lambda v, m: f"{v:.2f} × ({m['ours'] / 1e6:.0f} of {m['reference'] / 1e6:.0f} MB, {m['many']} of {m['few']} images; "
                     f"with pages of mapped files {m['all_many'] / m['all_few']:.2f} ×)",
        lambda v, m: v <= 1.1),
    "import": (
        "`import sft_course`, before torch is needed", "≤ 0.2 s",
        lambda m: m["ours"], lambda v, m: f"{v:.3f} s", lambda v, m: v <= .2),
}


def own_targets(rows):
    "Rows of the table of targets that were measured for themselves."
    found = {(r["what"], r["data"]): r["measured"] for r in rows if r["kind"] == "target"}
    out = []
    for name, (says, target, judge, show, ok) in TARGETS.items():
        for (what, data), m in found.items():
            if what == name:
                out.append(judged(says, data, target, show(judge(m), m), ok(judge(m), m)))
    return out


def render(rows, lines, code=None):
    "All tables as Markdown. code: {peer or target: the hash of its files now}, to say which rows are older."
    rows = latest(rows)
    parts = []
    for data, peers in by_data(rows).items():
        r = next(iter(peers.values()))[0]
        seeds = ", ".join(sorted({str(x["seed"]) for rs in peers.values() for x in rs}))
        parts.append(f"**{data}**, {r['train']} images to learn from, {r['val']} to report on, {r['classes']} classes, {r['size']} px, "
                     f"seeds {seeds}, {r['threads']} threads:\n\n{peer_table(peers, lines)}")
    judgements = [x for d, peers in by_data(rows).items() for x in peer_targets(d, peers)] + own_targets(rows)
    if judgements:
        parts.append("**Targets**\n\n" + table(["", "data", "target", "measured", "met"], judgements))
    return "\n\n".join(parts + notes(rows, code or {})) + "\n"


def notes(rows, code):
    "What a reader of the tables should know about how the rows came about."
    out = []
    if (foreign := [r["foreign_cores"] for r in rows if r.get("foreign_cores") is not None]):
        out.append(f"Other processes used {median(foreign):.2f} of the cores in the median run and {max(foreign):.2f} in the worst.")
    if (v := versions(rows)):
        out.append("Versions: " + ", ".join(v) + ".")
    if (left := {r["data"]: r["left_out"] for r in rows if r.get("left_out")}):
        named = "; ".join(f"{d}: {', '.join(f)}" for d, f in left.items())
        out.append(f"Left out, because not every peer's reader takes them: {named}.")
    old = sorted({f"{r['what']} on {r['data']}" for r in rows if code.get(r["what"]) not in (None, r["code"])})
    if old:
        out.append("Made by other code than is here now: " + ", ".join(old) + ".")
    return out


def versions(rows):
    found = {k: v for r in rows for k, v in r.get("versions", {}).items()}
    return [f"{k} {v}" for k, v in sorted(found.items())]


def write_tables(readme, text):
    "Put `text` between the marks of the file `readme`."
    write_between(readme, *MARKS, f"\n{text}")


def draw(rows, path):
    "Accuracy against seconds for each data set: every seed thin, the mean curve thick."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    found = by_data(latest(rows))
    fig, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 4.2), squeeze=False, layout="constrained")
    for ax, (data, peers) in zip(axes[0], found.items(), strict=True):
        for p, rs in peers.items():
            for r in rs:
                ax.plot(*zip(*points(r), strict=True), color=COLOURS[p], lw=.7, alpha=.4, drawstyle="steps-post")
            t, a = zip(*mean_curve([points(r) for r in rs]), strict=True)
            ax.plot(t, a, color=COLOURS[p], lw=2.2, drawstyle="steps-post", label=NAMES[p].replace("`", ""))
            ax.plot(t[-1], a[-1], "o", color=COLOURS[p])
        first = next(iter(peers.values()))[0]
        ax.set(xscale="log", xlabel="seconds on the clock (logarithmic)", ylabel="accuracy on the reported images",
               title=f"{data}: {first['train']} images, {first['size']} px")
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"), minor_formatter=NullFormatter())
        ax.grid(alpha=.3), ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
