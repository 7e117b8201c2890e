"""What an inference engine would save: the frozen part of the bundled network, with the features of every stage, as the library runs it
and in other engines. `python tests/benchmarks/engines.py` prints a table, `--write` puts it into README.md; run it with nothing else on the machine.

ONNX Runtime comes with the extra `export`; `pip install openvino` adds its row, g++ that of torch.compile. An engine pays from the number of
images on at which its faster passes (two of each image) have made up for its conversion; n is how many images that is.
"""
import argparse
import io
import time
from pathlib import Path
from statistics import median

import torch
from marks import write_between

from sft_course.tools.opening import open_backbone
from sft_course.tools.surgery import fold_for
from sft_course.tools.taps import stage_features

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- engines begin -->", "<!-- engines end -->"
SIZES, BATCH, TURNS, STEPS = (96, 160), 16, 5, 12


def onnx_bytes(net, x):
    "The network as an ONNX file, for batches of the size of `x`."
    file = io.BytesIO()
    torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(file)
    return file.getvalue()


def onnx_runtime(net, x):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_bytes(net, x), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda some: session.run(None, {name: some.numpy()})[0]


def openvino(net, x, precision="f32"):
    import openvino
    made = openvino.compile_model(openvino.convert_model(net, example_input=x), "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda some: made(some.numpy())[0]


def compiled(net, x):
    torch._dynamo.reset()  # another size is another network, not a reason to make the sizes variable
    made = torch.compile(net, dynamic=False)
    made(x)
    return made


ENGINES = {
    "the library's": lambda net, x: net,
    "torch.compile": compiled,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "OpenVINO, bfloat16": lambda net, x: openvino(net, x, "bf16"),
}


def measure(size: int) -> list[dict]:
    "A row for each engine that is there: images a second, seconds of conversion, and how far its features are off."
    net = fold_for(stage_features(open_backbone("lite0")), size).eval()
    x = torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    truth, runs, rows = net(x), {}, {}
    for name, make in ENGINES.items():
        begun = time.perf_counter()
        try:
            runs[name] = make(net, x)
        except (ImportError, RuntimeError) as e:
            print(f"{name}: left out ({type(e).__name__}: {str(e).splitlines()[0][:80]})")
            continue
        rows[name] = {"size": size, "engine": name, "conversion": time.perf_counter() - begun, "spans": []}
        off = (torch.as_tensor(runs[name](x)) - truth).abs()
        rows[name] |= {"mean off": (off.mean() / truth.abs().mean()).item(), "most off": off.max().item()}
    for _ in range(TURNS):  # in turn, so that what else the machine does meets all alike
        for name, run in runs.items():
            begun = time.perf_counter()
            for _ in range(STEPS):
                run(x)
            rows[name]["spans"].append((time.perf_counter() - begun) / STEPS / BATCH)
    return list(rows.values())


def table(rows: list[dict]) -> str:
    "The rows as Markdown."
    lines = ["| pixels | engine | images a second | times ours | conversion, s | pays from n images | features off, mean (most) |",
             "|--:|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        ours = median(next(r for r in rows if r["size"] == row["size"])["spans"])
        mine = median(row["spans"])
        n = row["conversion"] / (2 * (ours - mine)) if mine < ours else None
        cells = [f"{row['conversion']:.1f}", f"{n:,.0f}" if n else "never", f"{100 * row['mean off']:.4f} % ({row['most off']:.4f})"]
        if row["engine"] == "the library's":
            cells = ["", "", ""]
        lines.append(f"| {row['size']} | {row['engine']} | {1 / mine:.0f} | {ours / mine:.2f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Batches of {BATCH}, {torch.get_num_threads()} threads, median of {TURNS} turns; torch "
                      f"{torch.__version__.split('+')[0]}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with torch.inference_mode():
        found = table([row for size in SIZES for row in measure(size)])
    print(found)
    if given.write:
        write_between(README, BEGIN, END, found)
