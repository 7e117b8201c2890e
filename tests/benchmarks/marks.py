"What all tables of README.md share: each stands between two marks."


def between_marks(text: str, begin: str, end: str, table: str) -> str:
    "`text` with `table` between the marks. A text without them ends the program."
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the marks {begin} and {end} are not there, or not once.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
