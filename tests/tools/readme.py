"""Refresh the parts of README.md that come from the scripts.

    python3 tests/tools/readme.py

These parts are the excerpts of traces, the scripts' times, and the number of tests.

An excerpt stands between ``` lines, under a comment that names the script, the section, the number
of lines, and the beginning of the first line. A test compares excerpts with the README.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.tools.exercise import NAMES, ROOT

README = ROOT / "README.md"
EXCERPT = re.compile(
    r"(?P<opening><!-- (?P<script>\w+) section (?P<number>\d+), (?P<count>\d+) lines from: "
    r"(?P<beginning>[^\n]+) -->\n```text\n)"
    r".*?"
    r"(?P<closing>```\n)", re.S)


# --------------------------------------------------------------------------------- the excerpts

def section_of(trace: str, number: int) -> list[str]:
    """Return the lines of one section of a whole trace."""
    return re.split(r"^── \d+ ── ", trace, flags=re.M)[number].splitlines()


def with_excerpts(readme: str, name: str, trace: str) -> str:
    """Return the README with every excerpt of one script taken from this trace of it.

    ValueError if a section has no line with which an excerpt begins.
    """
    def refreshed(match: re.Match) -> str:
        if match["script"] != name:
            return match[0]
        lines = section_of(trace, int(match["number"]))
        beginning = match["beginning"]
        for start, line in enumerate(lines):
            if line.startswith(beginning):
                excerpt = lines[start:start + int(match["count"])]
                text = "".join(line + "\n" for line in excerpt)
                return match["opening"] + text + match["closing"]
        raise ValueError(f"section {match['number']} of {name} has no line that begins with "
                         f"{beginning!r}")

    return EXCERPT.sub(refreshed, readme)


# ----------------------------------------------------------------------------- the command line

def run(*command: str, check: bool = False) -> str:
    """Return what Python with these arguments prints, started in the project's folder."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                          encoding="utf-8", cwd=ROOT, check=check)
    return done.stdout


def with_trace_and_time(readme: str, name: str) -> str:
    """Run a script; return the README with its excerpts and with the seconds it took."""
    start = time.perf_counter()
    trace = run(f"{name}.py", check=True)
    seconds = max(1, round(time.perf_counter() - start))
    readme = with_excerpts(readme, name, trace)
    return re.sub(rf"(<!-- time of {name} -->)about [\d.]+ s", rf"\g<1>about {seconds} s", readme)


def with_number_of_tests(readme: str) -> str:
    """Return the README with the number of tests that pytest collects."""
    collected = run("-m", "pytest", "--collect-only", "-q")
    counts = re.findall(r"^tests/\S+: (\d+)$", collected, re.M)
    if not counts:
        return readme
    return re.sub(r"(<!-- tests -->)[\d,]+", rf"\g<1>{sum(map(int, counts)):,}", readme)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    for name in NAMES:
        readme = with_trace_and_time(readme, name)
    readme = with_number_of_tests(readme)
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
