"""Makes a release, and pushes nothing: python docs/release.py VERSION. `make release VERSION=0.2.0` calls it.

Dates the changelog, writes the version where it stands, builds, checks what was built, commits and tags. If a step fails, the files are put
back as they were.
"""
import argparse
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SEMANTIC = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
EDITED = ("CHANGELOG.md", "sft_course/__init__.py", "CITATION.cff")


def git(*args: str, repo: Path = REPO) -> str:
    done = subprocess.run(["git", *args], cwd=repo, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"release: git {args[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def refusal(version: str, repo: Path = REPO) -> str:
    "Why this version cannot be released now, in one sentence; empty where it can."
    if not SEMANTIC.fullmatch(version):
        return f"{version!r} is no semantic version; give three numbers, such as 0.2.0."
    tags = [tag[1:] for tag in git("tag", "--list", "v*", repo=repo).split() if SEMANTIC.fullmatch(tag[1:])]
    newest = max(tags, key=number, default=None)
    if newest and number(version) <= number(newest):
        return f"{version} is not after {newest}, the newest tag."
    if git("status", "--porcelain", repo=repo):
        return "the work tree is not clean; commit or stash what has changed."
    heading = re.search(r"^## (\S+)(.*)$", (repo / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if not heading or "not released" not in heading[2]:
        return "the topmost heading of CHANGELOG.md does not say (not released); is there nothing to release?"
    return ""


def write_version(version: str, today: str, repo: Path = REPO) -> None:
    "Puts version and date into the changelog, the package and the citation."
    changes = {
        "CHANGELOG.md": (r"^## \S+ \(not released\)$", f"## {version} ({today})"),
        "sft_course/__init__.py": (r'^__version__ = ".*"$', f'__version__ = "{version}"'),
        "CITATION.cff": (r"^version: .*(\ndate-released: .*)?$", f"version: {version}\ndate-released: {today}"),
    }
    for name, (old, new) in changes.items():
        text, found = re.subn(old, new, (repo / name).read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
        if not found:
            raise SystemExit(f"release: {name}: there is no line for the version.")
        (repo / name).write_text(text, encoding="utf-8")


def run(*command: str) -> None:
    print(" ".join(map(str, command)), flush=True)
    subprocess.run(command, cwd=REPO, check=True)


def build_and_check(version: str) -> None:
    python = sys.executable
    place = REPO / "dist" / version
    run(python, "-m", "build", "--outdir", place)
    names = sorted(f.name for f in place.iterdir())
    if [f"sft_course-{version}-py3-none-any.whl", f"sft_course-{version}.tar.gz"] != names:
        raise SystemExit(f"release: {place} holds {', '.join(names)}; one wheel and one sdist of {version} were expected.")
    run(python, "-m", "pytest", "tests/test_sync.py")
    run("bash", "tests/wheel_check.sh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    version = parser.parse_args().version
    if why := refusal(version):
        sys.exit(f"release: {why}")
    try:
        write_version(version, date.today().isoformat())
        build_and_check(version)
    except BaseException:
        git("checkout", "--", *EDITED)
        print("release: a step failed; nothing was committed, and the files are as they were.", file=sys.stderr)
        raise
    git("commit", "--all", "--message", f"Release {version}")
    git("tag", "--annotate", f"v{version}", "--message", f"sft_course {version}")
    print(f"\nsft_course {version} is built in dist/{version} and tagged v{version}. Nothing was pushed. To publish it:\n"
          f"  git push origin main v{version}\n  python -m twine upload dist/{version}/*")


if __name__ == "__main__":
    main()
