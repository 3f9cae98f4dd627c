"""Refresh the parts of README.md that come from the scripts.

    python tests/tools/readme.py

These parts are the excerpts of traces, the scripts' times, the map, and the number of tests.

An excerpt stands between ``` lines, under a comment that names the script, the section, the number
of lines, and the beginning of the first line. The map is made from the table of sections and the
list of papers of each script, and from its tests. A test compares excerpts and map with the README.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.tools.exercise import NAMES, ROOT, floors, sections, source_of

README = ROOT / "README.md"
EXCERPT = re.compile(
    r"(?P<opening><!-- (?P<script>\w+) section (?P<number>\d+), (?P<count>\d+) lines from: "
    r"(?P<beginning>[^\n]+) -->\n```text\n)"
    r".*?"
    r"(?P<closing>```\n)", re.S)
MAP = re.compile(r"(?P<opening><!-- map -->\n).*?(?P<closing><!-- end of map -->\n)", re.S)
NO_TEST = "—"


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


# ----------------------------------------------------------------------------------- the papers

def papers(source: str) -> dict[int, list[str]]:
    """Return {section: links to its papers}, from the list in a script's docstring.

    An entry of the list is one or more papers with "; " between them, followed by its sections:

        Dao et al., FlashAttention, 2022, arXiv:2205.14135      sections 1, 3
    """
    docstring = ast.get_docstring(ast.parse(source))
    listed = docstring.partition("The papers:\n")[2]
    one_entry_a_line = re.sub(r"\n    +", " ", listed)
    found: dict[int, list[str]] = {}
    for entry, numbers in re.findall(r"(.+?) +sections? ([\d, ]+)(?:\n|\Z)", one_entry_a_line):
        links = [link_to(paper) for paper in entry.strip().split("; ")]
        for number in re.findall(r"\d+", numbers):
            found.setdefault(int(number), []).extend(links)
    return found


def link_to(paper: str) -> str:
    """Return a link "[authors year](address)" for a paper, or its text alone without an address."""
    cited = paper.split(",")[0]
    year = re.search(r"\b(?:19|20)\d\d\b", paper)
    if year and not cited.endswith(year[0]):
        cited = f"{cited} {year[0]}"
    arxiv = re.search(r"\d{4}\.\d{5}", paper)
    page = re.search(r"\b[\w-]+(?:\.[\w-]+)+/[^\s,]+", paper)
    if arxiv:
        return f"[{cited}](https://arxiv.org/abs/{arxiv[0]})"
    if page:
        return f"[{cited}](https://{page[0]})"
    return cited


# --------------------------------------------------------------------------- which test is whose

def mentions(tree: ast.AST) -> list[str]:
    """Return every name, attribute and text in a syntax tree."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@functools.cache
def tests_of(name: str) -> dict[str, list[str]]:
    """Return {test: what it mentions} for the tests of a script.

    What the helpers and tables mention that a test uses counts as mentioned by the test.
    """
    source = (ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8")
    helpers = {}
    tests = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            tests[node.name] = mentions(node)
        elif isinstance(node, ast.FunctionDef):
            helpers[node.name] = mentions(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    helpers[target.id] = mentions(node.value)
    for words in tests.values():
        for helper in set(words) & helpers.keys():
            words += helpers[helper]
    return tests


def test_of(name: str, function: str) -> str | None:
    """Return the test of a script that is most about a function, or None if none mentions it.

    This is the test whose own name has most of the words of the function's name. Of equals, it is
    one that is not about refusals, and then the one that mentions the function most often.
    """
    parts = [part for part in function.lower().split("_") if len(part) > 2]
    best = None
    best_score = None
    for test, words in tests_of(name).items():
        if function in words:
            in_name = sum(part in test for part in parts)
            score = in_name, "refuse" not in test, words.count(function)
            if best_score is None or score > best_score:
                best = test
                best_score = score
    return best


@functools.cache
def callers_of(source: str) -> dict[str, list[str]]:
    """Return {function or class: what it mentions} of a script, without experiments and main."""
    experiments = floors(source).get("THE EXPERIMENTS", range(0))
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if node.lineno not in experiments and not node.name.startswith(("show_", "main")):
            found[node.name] = mentions(node)
    return found


def graded_by(name: str, function: str, source: str, seen: tuple[str, ...] = ()) -> str:
    """Return the test of a function, as a cell of the map.

    If no test mentions the function, this is the test of a function that calls it. If there is
    none, these are the checks of the script's trace; or NO_TEST inside the search (seen).
    """
    test = test_of(name, function)
    if test:
        return f"`{test}`"
    for caller, words in callers_of(source).items():
        if function in words and caller not in (function, *seen):
            found = graded_by(name, caller, source, (function, *seen))
            if found != NO_TEST:
                return found if "through" in found else f"{found}, through `{caller}`"
    return NO_TEST if seen else "`test_the_whole_trace_ends_well`, by its checks"


# -------------------------------------------------------------------------------------- the map

@functools.cache
def technique_map() -> str:
    """Return a table of techniques, with their tests and papers, for each script."""
    return "".join(map(table_of, NAMES))


def table_of(name: str) -> str:
    """Return the table of one script: a row for each function in the head of a section."""
    source = source_of(name)
    cited = papers(source)
    rows = []
    for number, (title, functions) in enumerate(sections(source), 1):
        # The first row of a section has its title and its papers.
        heading = f"{number}. {title}"
        links = ", ".join(cited.get(number, []))
        for function in functions:
            test = graded_by(name, function, source)
            rows.append(f"| {heading} | `{function}` | {test} | {links} |\n")
            heading = ""
            links = ""
    n_sections = len(sections(source))
    return (f"<details><summary><b>{name}.py</b>: {len(rows)} functions in {n_sections} sections, "
            f"tested in tests/test_{name}.py</summary>\n\n"
            "| section | function | test | paper |\n|---|---|---|---|\n"
            f"{''.join(rows)}\n</details>\n\n")


def with_map(readme: str) -> str:
    """Return the README with the map as it is now."""
    return MAP.sub(lambda match: match["opening"] + technique_map() + match["closing"], readme)


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
    readme = with_map(README.read_text(encoding="utf-8"))
    for name in NAMES:
        readme = with_trace_and_time(readme, name)
    readme = with_number_of_tests(readme)
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
