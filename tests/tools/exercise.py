"""Make an exercise: a copy of a script without its techniques, for the learner to write.

    python tests/tools/exercise.py microflash my/                  without all techniques
    python tests/tools/exercise.py microflash.flash_attention my/  without this function
    python tests/tools/exercise.py microkv.BlockPool.allocate my/  without this method
    python tests/tools/exercise.py --hint microflash my/           with a hint in each body
    python tests/tools/exercise.py --list                          list all techniques

The exercise is written to my/microflash.py. Docstrings and prose stay in it, and so does everything
that is not a technique. A file that exists already is never overwritten.

`python -m pytest --impl=my` grades the scripts in my/. `python my/microflash.py` prints its trace;
a section whose technique is not written yet says so.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]  # of the project
NAMES = ["microattention", "microkv", "microflash", "microquant", "microbeam"]

FLOOR = re.compile(
    r"# (THE TECHNIQUES|THE EXPERIMENTS|THE MODEL AND THE BENCH|SHARED BY THE FIVE)\b")
SETUP = ("__init__", "__post_init__")  # methods that only set up an object: not exercises


class Technique(NamedTuple):
    """A function or method for the learner to write."""

    name: str     # of a method: Class.method
    section: int
    node: ast.FunctionDef


def source_of(script: str) -> str:
    """Return the source of one of the five scripts."""
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


# ------------------------------------------------------------- what stands where in a script

def sections(source: str) -> list[tuple[str, list[str]]]:
    """Return (title, names of the techniques in its head) of each section of a script."""
    for node in ast.parse(source).body:
        if ast.unparse(node).startswith(("SECTIONS =", "SECTIONS:")):
            return [title_and_names(row) for row in node.value.elts]
    raise ValueError("the script has no table SECTIONS = […]")


def title_and_names(row: ast.expr) -> tuple[str, list[str]]:
    """Return the title and the names of the techniques of one row of SECTIONS.

    A row is a tuple (title, show, techniques), or a call Section(title, show, techniques, core).
    """
    if isinstance(row, ast.Call):
        fields = dict(zip(["title", "show", "techniques"], row.args))
        fields |= {keyword.arg: keyword.value for keyword in row.keywords}
        title = fields["title"]
        techniques = fields["techniques"]
    else:
        title, _, techniques = row.elts
    return title.value, [ast.unparse(name) for name in techniques.elts]


def floors(source: str) -> dict[str, range]:
    """Return {heading: its lines, counted from 1} of the floors, or {} if the script has none.

    The heading of a floor stands between ruled lines, as in

        # =====================
        # THE TECHNIQUES: text may follow
        # =====================
    """
    lines = source.splitlines()
    starts = {}
    for number, (above, line) in enumerate(pairwise(lines), 2):
        heading = FLOOR.match(line)
        if heading and above.startswith("# ==="):
            starts[heading[1]] = number
    bounds = [*starts.values(), len(lines) + 1]
    return {heading: range(*span) for heading, span in zip(starts, pairwise(bounds))}


def section_of_each_line(source: str) -> list[int]:
    """Return for each line of a script the number of its section; 0 is outside of all sections.

    A section opens with a comment "# 3. Title", under a ruled line or as the first line of a
    comment. In a script without floors, a ruled line with another text below ends the section.
    """
    has_floors = bool(floors(source))
    number = 0
    numbers = []
    for above, line in pairwise(["", *source.splitlines()]):
        heading = re.match(r"# (\d+)\. ", line)
        under_rule = above.startswith(("# ---", "# ==="))
        if heading and (under_rule or not above.startswith("#")):
            number = int(heading[1])
        elif under_rule and not has_floors:
            number = 0
        numbers.append(number)
    return numbers


def techniques(source: str) -> list[Technique]:
    """Return the techniques of a script, in the order of its source.

    In a script with floors they are the public functions, and the methods of public classes, of its
    first floor. What prints stays with the script, and so do checks of arguments (check_…) and what
    main calls before it prints: without it, there would be no trace. In a script without floors
    they are the functions and classes in numbered sections that SECTIONS names.
    """
    tree = ast.parse(source)
    first_floor = floors(source).get("THE TECHNIQUES")
    named = {name for _, names in sections(source) for name in names}
    needed_by_main = names_that_main_needs(tree)
    section_of_line = section_of_each_line(source)
    found = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        section = section_of_line[node.lineno - 1]
        if first_floor is None:
            is_technique = node.name in named
        else:
            is_technique = (node.lineno in first_floor and node.name not in needed_by_main
                            and is_for_the_learner(node))
        if section and is_technique:
            found += [Technique(name, section, function) for name, function in functions_in(node)]
    return found


def names_that_main_needs(tree: ast.Module) -> set[str]:
    """Return the names used by main, and by the functions that it calls, and so on.

    What a lambda or a method uses does not count, because it runs later or never.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = set()
    to_visit = [functions["main"]] if "main" in functions else []
    while to_visit:
        node = to_visit.pop()
        if isinstance(node, ast.Name) and node.id not in names:
            names.add(node.id)
            if node.id in functions:
                to_visit.append(functions[node.id])
        if not isinstance(node, ast.Lambda):
            to_visit += ast.iter_child_nodes(node)
    return names


def is_for_the_learner(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Return whether a definition is public, prints nothing, and is no check of arguments."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    parameters = {part.arg for part in parts if isinstance(part, ast.arg)}
    prints = "print" in names or "trace" in parameters
    return not prints and not node.name.startswith(("_", "check_"))


def functions_in(node: ast.FunctionDef | ast.ClassDef) -> list[tuple[str, ast.FunctionDef]]:
    """Return (name, function) of a function, or of each method of a class but those for setup."""
    if isinstance(node, ast.FunctionDef):
        return [(node.name, node)]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return [(f"{node.name}.{method.name}", method) for method in methods
            if method.name not in SETUP]


# ------------------------------------------------------------------------ taking functions out

def body_lines(node: ast.FunctionDef) -> range:
    """Return the lines, counted from 1, of a function's body without its docstring."""
    has_docstring = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno + 1 if has_docstring else node.body[0].lineno
    return range(first, node.end_lineno + 1)


def hint(body: str, node: ast.FunctionDef) -> str:
    """Return the first comment of a body. If it has none, return a comment with what it calls."""
    # The body is indented, so it needs a line above that opens a block.
    for token in tokenize.generate_tokens(io.StringIO("if True:\n" + body).readline):
        if token.type == tokenize.COMMENT:
            return token.string
    calls = [ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)]
    names = [call for call in calls if re.fullmatch(r"[\w.]+", call)]
    return "# calls " + ", ".join(dict.fromkeys(names)) if calls else ""


def taken_out(source: str, chosen: list[Technique], hints: bool = False) -> str:
    """Return the source with `raise NotImplementedError("name")` for each chosen technique's body.

    hints: leave a hint above it.
    """
    lines = source.splitlines(keepends=True)
    # From the last to the first, so that the line numbers of those above stay valid.
    for technique in reversed(chosen):
        node = technique.node
        where = body_lines(node)
        old_lines = slice(where.start - 1, where.stop - 1)
        indent = " " * (node.col_offset + 4)
        new_lines = [f'{indent}raise NotImplementedError("{technique.name}")\n']
        if hints:
            clue = hint("".join(lines[old_lines]), node)
            if clue:
                new_lines.insert(0, f"{indent}{clue}\n")
        lines[old_lines] = new_lines
    return "".join(lines)


# ---------------------------------------------------------------------------- the command line

def write_exercise(target: Path, text: str) -> str | None:
    """Write a new file. Return None, or a sentence that says why it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return f"{target} exists and is left alone; choose another folder, or move the file"
    except OSError as error:
        return f"cannot write {target}: {error.strerror}"
    return None


def print_techniques(scripts: list[str]) -> None:
    """Print the name and the section of each technique of these scripts, one a line."""
    for script in scripts:
        for technique in techniques(source_of(script)):
            print(f"{script}.{technique.name}  (section {technique.section})")


def main() -> int:
    parser = argparse.ArgumentParser(prog="exercise.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="", help="a script, or script.technique")
    parser.add_argument("folder", nargs="?", type=Path, help="where the exercise goes")
    parser.add_argument("--hint", action="store_true",
                        help="leave the first comment of each body, or what the body calls")
    parser.add_argument("--list", action="store_true",
                        help="list the techniques (of one script, or of all) and stop")
    arguments = parser.parse_args()

    def refuse(message: str) -> None:
        parser.exit(2, f"exercise.py: {message}\n")

    if arguments.list and not arguments.what:
        print_techniques(NAMES)
        return 0
    script, _, wanted = arguments.what.removesuffix(".py").partition(".")
    if script not in NAMES:
        refuse(f"the scripts are {', '.join(NAMES)}; not {script!r}")
    if arguments.list:
        print_techniques([script])
        return 0

    source = source_of(script)
    chosen = techniques(source)
    if wanted:
        chosen = [technique for technique in chosen
                  if technique.name == wanted or technique.name.startswith(wanted + ".")]
    if not chosen:
        refuse(f"{script} has no technique {wanted!r}; --list {script} names them")
    if arguments.folder is None:
        refuse(f"give a folder for the exercise, as in: exercise.py {arguments.what} my/")
    target = arguments.folder / f"{script}.py"
    failure = write_exercise(target, taken_out(source, chosen, arguments.hint))
    if failure:
        refuse(failure)
    print(f"{target}: {len(chosen)} to write: {', '.join(t.name for t in chosen)}.\n"
          f"Grade it with: python -m pytest --impl={arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
