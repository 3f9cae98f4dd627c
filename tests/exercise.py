"""Make an exercise of a script: its techniques taken out, for the learner to write; the parity tests grade them.

    python tests/exercise.py microflash my/                   my/microflash.py, all its techniques taken out
    python tests/exercise.py microflash.flash_attention my/   only this one (or a method: microkv.BlockPool.allocate)
    python tests/exercise.py --hint microflash my/            leaving the first comment of each body, or what it calls
    python tests/exercise.py --list                           every technique, and the section it is in

A technique is a function or class that the head of a section names and that stands in a numbered section. Its
docstring and the prose around it stay, and so does the supporting cast. `pytest --impl=my` then grades what is in
my/, and `python my/microflash.py` prints its trace as far as it goes. A file that is there is never overwritten.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["microattention", "microkv", "microflash", "microquant", "microbeam"]


class Technique(NamedTuple):
    """A function, method or class's method to be written: its name (Class.method), section, and place in the source."""
    name: str
    section: int
    node: ast.FunctionDef


def sections(source: str) -> list[tuple[str, list[str]]]:
    """(title, names in its head) of each section, from the table SECTIONS of a script's source."""
    table = next(node.value for node in ast.parse(source).body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SECTIONS")
    return [(row.elts[0].value, [name.id for name in row.elts[2].elts]) for row in table.elts]


def techniques(source: str) -> list[Technique]:
    """The techniques in a script's source, in order. Of a class: its methods but for those that only set it up."""
    number, section_of_line = 0, []  # 0: outside the numbered sections
    for line, above in zip(source.splitlines(), ["", *source.splitlines()]):
        if above.startswith("# -----"):
            number = int(line[2:line.index(".")]) if re.match(r"# \d+\. ", line) else 0
        section_of_line.append(number)
    named = {name for _, names in sections(source) for name in names}
    found = []
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in named and (number := section_of_line[node.lineno - 1]):
            if isinstance(node, ast.FunctionDef):
                found.append(Technique(node.name, number, node))
            else:
                found += [Technique(f"{node.name}.{method.name}", number, method) for method in node.body
                          if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "__post_init__")]
    return found


def body_lines(node: ast.FunctionDef) -> range:
    """The lines of a function's body, counted from 1, its docstring left out."""
    documented = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno + 1 if documented else node.body[0].lineno
    return range(first, node.end_lineno + 1)


def hint(body: str, node: ast.FunctionDef) -> str:
    """The first comment of a body; where there is none, what the body calls."""
    tokens = tokenize.generate_tokens(io.StringIO("if True:\n" + body).readline)
    if comment := next((token.string for token in tokens if token.type == tokenize.COMMENT), None):
        return comment
    calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
    return "# calls " + ", ".join(dict.fromkeys(name for name in calls if re.fullmatch(r"[\w.]+", name))) if calls else ""


def taken_out(source: str, chosen: list[Technique], hints: bool = False) -> str:
    """The source with the bodies of the chosen techniques replaced by a NotImplementedError that names them."""
    lines = source.splitlines(keepends=True)
    for name, _, node in reversed(chosen):
        where, indent = body_lines(node), " " * (node.col_offset + 4)
        old = "".join(lines[where.start - 1:where.stop - 1])
        clue = hint(old, node) if hints else ""
        lines[where.start - 1:where.stop - 1] = [f"{indent}{clue}\n"] * bool(clue) + [
            f'{indent}raise NotImplementedError("{name}")\n']
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="exercise.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="a script, or script.technique")
    parser.add_argument("folder", nargs="?", type=Path, help="where the exercise goes")
    parser.add_argument("--hint", action="store_true", help="leave the first comment of each body, or what it calls")
    parser.add_argument("--list", action="store_true", help="list the techniques (of one script, or all) and stop")
    arguments = parser.parse_args()

    script, _, wanted = (arguments.what or "").removesuffix(".py").partition(".")
    if script not in NAMES and not (arguments.list and not script):
        parser.exit(2, f"exercise.py: the scripts are {', '.join(NAMES)}; not {script!r}\n")
    if arguments.list:
        for name in [script] if script else NAMES:
            for technique, number, _ in techniques((ROOT / f"{name}.py").read_text(encoding="utf-8")):
                print(f"{name}.{technique}  (section {number})")
        return 0

    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    chosen = [t for t in techniques(source) if not wanted or t.name == wanted or t.name.startswith(wanted + ".")]
    if not chosen:
        parser.exit(2, f"exercise.py: {script} has no technique {wanted!r}; --list {script} names them\n")
    if arguments.folder is None:
        parser.exit(2, f"exercise.py: give a folder for the exercise, as in: exercise.py {arguments.what} my/\n")
    target = arguments.folder / f"{script}.py"
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        with open(target, "x", encoding="utf-8") as file:
            file.write(taken_out(source, chosen, arguments.hint))
    except FileExistsError:
        parser.exit(2, f"exercise.py: {target} is there already and is left alone; choose another folder, or move it\n")
    except OSError as error:
        parser.exit(2, f"exercise.py: cannot write {target}: {error.strerror}\n")
    print(f"{target}: {len(chosen)} to write: {', '.join(technique.name for technique in chosen)}.\n"
          f"Grade it with: python -m pytest --impl={arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
