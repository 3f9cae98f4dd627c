"""Refresh what README.md shows of the scripts: excerpts of their traces, their times, the map, the number of tests.

    python tests/readme.py

An excerpt stands between ``` lines under a comment that says where it is from: the script, the section, the
beginning of its first line, and how many lines it has. The map comes from the table of sections, the list of papers in
the docstring, and the tests of a script. Tests hold that excerpts and map are what this makes.
"""

import ast
import functools
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.tools.exercise import NAMES, ROOT, sections

EXCERPT = re.compile(r"(<!-- (\w+) section (\d+), (\d+) lines from: ([^\n]+) -->\n```text\n)(.*?)(```\n)", re.S)
MAP = re.compile(r"(<!-- map -->\n)(.*?)(<!-- end of map -->\n)", re.S)


def section_of(trace: str, number: int) -> list[str]:
    """The lines of one section of a whole trace."""
    return re.split(r"^── \d+ ── ", trace, flags=re.M)[number].splitlines()


def with_excerpts(readme: str, name: str, trace: str) -> str:
    """The README with every excerpt of one script's whole trace as it is now."""
    def excerpt(match):
        opening, script, number, count, beginning, old, closing = match.groups()
        if script != name:
            return match[0]
        lines = section_of(trace, int(number))
        start = next((i for i, line in enumerate(lines) if line.startswith(beginning)), None)
        if start is None:
            raise ValueError(f"section {number} of {name} has no line that begins with {beginning!r}")
        return opening + "".join(line + "\n" for line in lines[start:start + int(count)]) + closing
    return EXCERPT.sub(excerpt, readme)


def papers(source: str) -> dict[int, list[str]]:
    """{section: links to its papers}, from the list in a script's docstring; every line ends on its sections."""
    listed = ast.get_docstring(ast.parse(source)).partition("The papers:\n")[2]
    found: dict[int, list[str]] = {}
    for entry, numbers in re.findall(r"(.+?) +sections? ([\d, ]+)(?:\n|\Z)", re.sub(r"\n    +", " ", listed)):
        links = []
        for paper in entry.strip().split("; "):
            authors, year = paper.split(",")[0], re.search(r"\b(?:19|20)\d\d\b", paper)
            cited = f"{authors} {year[0]}" if year and not authors.endswith(year[0]) else authors
            arxiv, page = re.search(r"\d{4}\.\d{5}", paper), re.search(r"\b[\w-]+(?:\.[\w-]+)+/[^\s,]+", paper)
            address = f"https://arxiv.org/abs/{arxiv[0]}" if arxiv else f"https://{page[0]}" if page else None
            links.append(f"[{cited}]({address})" if address else cited)
        for number in map(int, re.findall(r"\d+", numbers)):
            found.setdefault(number, []).extend(links)
    return found


def mentions(nodes: list[ast.AST]) -> list[str]:
    """Every name, attribute and text in some syntax trees."""
    fields = [(node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else
               node.value if isinstance(node, ast.Constant) else None) for tree in nodes for node in ast.walk(tree)]
    return [field for field in fields if isinstance(field, str)]


@functools.cache
def tests_of(name: str) -> dict[str, list[str]]:
    """{test: what it mentions, itself or in the helpers and tables of its file} for the tests of a script."""
    helpers, tests = {}, {}
    for node in ast.parse((ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            (tests if node.name.startswith("test_") else helpers)[node.name] = node
        elif isinstance(node, ast.Assign):
            helpers |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    return {test: mentions([node]) + mentions([helpers[word] for word in set(mentions([node])) & helpers.keys()])
            for test, node in tests.items()}


def test_of(name: str, function: str) -> str | None:
    """The test in a script's test file that is most about a function: named like it, or using it most."""
    words = [word for word in function.lower().split("_") if len(word) > 2]
    using = {test: (sum(word in test for word in words), "refuse" not in test, words_in.count(function))
             for test, words_in in tests_of(name).items() if function in words_in}
    return max(using, key=using.get, default=None)


@functools.cache
def calls_of(source: str) -> dict[str, list[str]]:
    """{function or class: what it mentions} of a script, but for what only shows."""
    return {node.name: mentions([node]) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("show_", "main"))}


def graded_by(name: str, function: str, source: str, seen: tuple = ()) -> str:
    """The test of a function; failing that, of a function that calls it; failing that, the checks of its trace."""
    if test := test_of(name, function):
        return f"`{test}`"
    for caller, mentioned in calls_of(source).items():
        if function in mentioned and caller not in (function, *seen):
            if (found := graded_by(name, caller, source, (function, *seen))) != "—":
                return found if "through" in found else f"{found}, through `{caller}`"
    return "—" if seen else "`test_the_whole_trace_ends_well`, by its checks"


@functools.cache
def technique_map() -> str:
    """For each script a table: technique (section), function, test, paper."""
    tables = []
    for name in NAMES:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        cited, rows = papers(source), []
        for number, (title, functions) in enumerate(sections(source), 1):
            for i, function in enumerate(functions):
                rows.append(f"| {f'{number}. {title}' * (i == 0)} | `{function}` | {graded_by(name, function, source)} "
                            f"| {', '.join(cited.get(number, [])) * (i == 0)} |\n")
        tables.append(f"<details><summary><b>{name}.py</b>: {len(rows)} functions in {number} sections, tested in "
                      f"tests/test_{name}.py</summary>\n\n| section | function | test | paper |\n|---|---|---|---|\n"
                      f"{''.join(rows)}\n</details>\n\n")
    return "".join(tables)


def with_map(readme: str) -> str:
    return MAP.sub(lambda match: match[1] + technique_map() + match[3], readme)


def main() -> None:
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    readme = with_map((ROOT / "README.md").read_text(encoding="utf-8"))
    for name in NAMES:
        start = time.perf_counter()
        trace = subprocess.run([sys.executable, str(ROOT / f"{name}.py")], capture_output=True, text=True, encoding="utf-8",
                               check=True).stdout
        seconds = time.perf_counter() - start
        readme = with_excerpts(readme, name, trace)
        readme = re.sub(rf"(<!-- time of {name} -->)about [\d.]+ s", rf"\g<1>about {max(1, round(seconds))} s", readme)
    collected = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q"], capture_output=True, text=True, cwd=ROOT).stdout
    if counts := re.findall(r"^tests/\S+: (\d+)$", collected, re.M):
        readme = re.sub(r"(<!-- tests -->)[\d,]+", rf"\g<1>{sum(map(int, counts)):,}", readme)
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
