"What all tables of README.md share: each stands between two marks."
from pathlib import Path


def between_marks(text: str, begin: str, end: str, table: str) -> str:
    "`text` with `table` between the marks. A text without them ends the program."
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the marks {begin} and {end} are not there, or not once.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def write_between(file: Path, begin: str, end: str, table: str) -> None:
    "Put `table` between the marks of a file."
    file.write_text(between_marks(file.read_text(encoding="utf-8"), begin, end, table), encoding="utf-8")
