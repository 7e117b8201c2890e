"""The new tasks beside their peers, from the recorded runs of chapters 15 to 18: prints a table.

`--write` puts it into README.md. `make record CHAPTER=16` measures a chapter's rows anew.
"""
import csv
import sys
from pathlib import Path

from marks import between_marks

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "nbs" / "runs"
BEGIN, END = "<!-- tasks begin -->", "<!-- tasks end -->"

# smp's loop: its learning rate, and its seconds
SMP = {"90 s": ("constant", "90.0"), "30 s, cosine": ("cosine", "30.0")}


def mask_ways(column: str) -> list[tuple]:
    "smp's loop in two ways, and ours, with this column of the records."
    plain = [(f"smp's plain loop, {name}", "16_membrane_smp", column, "seconds", {"plan": p, "seconds": s}) for name, (p, s) in SMP.items()]
    return [*plain, ("`sft-course fit`", "16_membrane", column, "seconds", {})]


# what is learned, and the score; then the ways: name, file, column of the score, column of the seconds, which rows
TABLE = [
    ("several labels, drawn flowers", "macro F1", [
        ("logistic regression on the last stage", "15_labels", "last, macro F1", None, {}),
        ("exact head on every stage", "15_labels", "every, macro F1", None, {}),
        ("then tuned", "15_labels", "tuned, macro F1", None, {})]),
    ("diameter, drawn flowers", "mean absolute error", [
        ("a constant", "15_diameter", "constant", None, {}),
        ("ridge regression on the last stage", "15_diameter", "last", None, {}),
        ("exact head on every stage", "15_diameter", "every", None, {}),
        ("then tuned", "15_diameter", "tuned", None, {})]),
    ("masks, nerve tissue", "IoU of both classes", mask_ways("test iou")),
    ("masks, nerve tissue", "share of wrong pixels", mask_ways("test error")),
    ("boxes, raccoons", "AP50", [
        ("torchvision's tutorial loop", "17_raccoons", "AP50", "seconds", {"way": "tutorial"}),
        ("`fit_boxes`, frozen body, as many passes", "17_raccoons", "AP50", "seconds", {"way": "frozen", "epochs": "3"}),
        ("`fit_boxes`, frozen body, twice as many", "17_raccoons", "AP50", "seconds", {"way": "frozen", "epochs": "6"})]),
    ("77 intents of a bank's customers, 20 questions each", "accuracy", [
        ("logistic regression on words", "18_heads", "words", None, {"per_class": "20"}),
        ("Hugging Face's Trainer, all layers", "18_trainer", "test", None, {"per_class": "20", "lr": "0.0003"}),
        ("exact head on a frozen encoder", "18_tuned", "head, all", None, {"per_class": "20"}),
        ("then two layers tuned", "18_tuned", "upper 2 layers", None, {"per_class": "20"}),
        ("both averaged", "18_tuned", "averaged", None, {"per_class": "20"})]),
    ("77 intents, all 10,003 questions", "accuracy", [
        ("logistic regression on words", "18_heads", "words", None, {"per_class": "0"}),
        ("exact head on a frozen encoder", "18_tuned", "head, all", None, {"per_class": "0"}),
        ("then two layers tuned", "18_tuned", "upper 2 layers", None, {"per_class": "0"}),
        ("both averaged", "18_tuned", "averaged", None, {"per_class": "0"})]),
]


def values(file: str, column: str, where: dict) -> list[float]:
    "A column of a record, of the rows where other columns are as `where` says."
    with open(RUNS / f"{file}.csv", newline="", encoding="utf-8") as f:
        return [float(r[column]) for r in csv.DictReader(f) if all(r[k] == v for k, v in where.items())]


def spread(found: list[float], digits: int) -> str:
    mean, low, high = (f"{v:,.{digits}f}" for v in (sum(found) / len(found), min(found), max(found)))
    return f"{mean} ({low} to {high})"


def table() -> str:
    "The table as Markdown: mean, least and greatest over seeds."
    lines = ["| data | score | way | mean (range) | seeds | processor seconds |", "|---|---|---|---|---|---|"]
    for data, score, ways in TABLE:
        columns = [values(file, column, where) for _, file, column, _, where in ways]
        digits = 4 if max(map(max, columns)) < .15 else 3
        for (way, file, _, seconds, where), found in zip(ways, columns):
            took = values(file, seconds, where) if seconds else []
            shown = f"{sum(took) / len(took):.0f}" if took else ""
            lines.append(f"| {data} | {score} | {way} | {spread(found, digits)} | {len(found)} | {shown} |")
    return "\n".join(lines)


def written(text: str) -> str:
    "README.md with the table between its marks."
    return between_marks(text, BEGIN, END, table())


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv[1:]:
        readme = HERE / "README.md"
        readme.write_text(written(readme.read_text(encoding="utf-8")), encoding="utf-8")
