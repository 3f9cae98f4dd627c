"""Make an exercise: a copy of a script without its techniques, to write anew.

    python3 tests/tools/exercise.py microflash my/                  all out
    python3 tests/tools/exercise.py microflash.flash_attention my/  a function
    python3 tests/tools/exercise.py microkv.BlockPool.allocate my/  a method
    python3 tests/tools/exercise.py --hint microflash my/           outlines
    python3 tests/tools/exercise.py --list microflash               the list

The exercise is written to my/microflash.py. Docstrings and prose stay in it,
and so does everything that is not a technique. If there is a my/microflash.py
already, a technique that you name is taken out of it, unless you have written
it yourself; nothing else in it changes.

`.venv/bin/python -m pytest --impl=my` grades the scripts in my/; the README
says how to make .venv. `python3 my/microflash.py` prints its trace; a section
whose technique is not written yet says so.

--hint leaves an outline of each body. --list prints, section by section, each
technique with its test, and the section's papers. The test is one that fails
if the technique is broken (tests/tools/find_tests.py tries it).
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]  # of the project
NAMES = ["microattention", "microkv", "microflash", "microquant", "microbeam"]

FLOOR = re.compile(
    r"# (THE TECHNIQUES|THE EXPERIMENTS|THE MODEL AND THE BENCH|SHARED BY THE FIVE)\b")
WIDTH = 80  # columns of what is printed, as in a trace
SETUP = ("__init__", "__post_init__")  # methods that only set up an object: not exercises


class Technique(NamedTuple):
    """A function or method for the learner to write."""

    name: str     # of a method: Class.method
    section: int
    node: ast.FunctionDef
    body: str     # its text, without the docstring


def source_of(script: str) -> str:
    """Return the source of one of the five scripts."""
    return read(ROOT / f"{script}.py")


def read(path: Path) -> str:
    """Return the text of a file, without the mark that some editors put at its beginning."""
    return path.read_text(encoding="utf-8-sig")


@functools.cache
def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a script, which nobody changes."""
    return ast.parse(source)


# ------------------------------------------------------------- what stands where in a script

def sections(source: str) -> list[tuple[str, list[str]]]:
    """Return (title, names of the techniques in its head) of each section of a script."""
    for node in parsed(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == "SECTIONS":
                return [title_and_names(row) for row in node.value.elts]
    raise ValueError("the script has no table SECTIONS = […]")


def title_and_names(row: ast.expr) -> tuple[str, list[str]]:
    """Return the title and the names of the techniques of a row Section(title, show, techniques).
    """
    fields = dict(zip(["title", "show", "techniques"], row.args))
    fields |= {keyword.arg: keyword.value for keyword in row.keywords}
    return fields["title"].value, [ast.unparse(name) for name in fields["techniques"].elts]


def floors(source: str) -> dict[str, range]:
    """Return {heading: its lines, counted from 1} of the floors of a script.

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

    A section opens with a comment whose first line is "# 3. Title".
    """
    number = 0
    numbers = []
    for above, line in pairwise(["", *source.splitlines()]):
        heading = re.match(r"# (\d+)\. ", line)
        if heading and not above.startswith("#"):
            number = int(heading[1])
        numbers.append(number)
    return numbers


@functools.cache
def techniques(source: str) -> list[Technique]:
    """Return the techniques of a script, in the order of its source.

    They are the public functions, and the methods of public classes, of its first floor. What
    prints stays with the script, and so do checks of arguments (check_…) and what main calls before
    it prints: without it, there would be no trace.
    """
    tree = parsed(source)
    first_floor = floors(source)["THE TECHNIQUES"]
    needed_by_main = names_that_main_needs(tree)
    section_of_line = section_of_each_line(source)
    lines = source.splitlines(keepends=True)
    found = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        section = section_of_line[node.lineno - 1]
        is_technique = (node.lineno in first_floor and node.name not in needed_by_main
                        and is_for_the_learner(node))
        if section and is_technique:
            for name, function in functions_in(node):
                where = body_lines(function)
                body = "".join(lines[where.start - 1:where.stop - 1])
                found.append(Technique(name, section, function, body))
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


def functions_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Return {name or Class.name: node} of the functions and methods of a script."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = method
    return found


def code_of(node: ast.FunctionDef) -> str:
    """Return the body of a function as text, without its docstring and comments."""
    statements = node.body
    if ast.get_docstring(node) is not None:
        statements = statements[1:]
    return "\n".join(ast.unparse(statement) for statement in statements)


def is_written(node: ast.FunctionDef) -> bool:
    """Return whether a function has a body, and not only what an exercise leaves of it."""
    code = code_of(node)
    return code not in ("", "pass", "...") and not code.startswith("raise NotImplementedError")


# ------------------------------------------------------------------------ taking functions out

def body_lines(node: ast.FunctionDef) -> range:
    """Return the lines, counted from 1, of a function's body without its docstring."""
    has_docstring = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno + 1 if has_docstring else node.body[0].lineno
    return range(first, node.end_lineno + 1)


LINES_OF_HINT = 20  # of an outline


def hint(technique: Technique, source: str) -> list[str]:
    """Return the lines of a hint, without their "# ": what a body uses, and its outline.

    They are made from the original's body. The outline has its statements and comments in their
    order, with "… (from a, b)" for what is computed from a and b. source: of the original.
    """
    node = technique.node
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = technique.body.splitlines()
    comments = {number: line.strip(" #") for number, line in zip(body_lines(node), lines)
                if line.strip().startswith("#")}
    n_lines = len(lines)
    words = f"{n_lines} line{'s' if n_lines > 1 else ''} in the original"
    names = used_names(statements, source)
    if names:
        words += f", with {', '.join(names)}"
    first = textwrap.wrap(words, WIDTH, subsequent_indent="    ", break_long_words=False)
    outline = []
    for statement in statements:
        outline += outline_of(statement, "", comments)
    outline = [line if len(line) <= WIDTH else f"{line[:WIDTH - 2]} …" for line in outline]
    if len(outline) > LINES_OF_HINT:
        outline = [*outline[:LINES_OF_HINT], "and so on"]
    return first + outline


def used_names(statements: list[ast.stmt], source: str) -> list[str]:
    """Return what statements use of the script, of its imports and of an object's attributes.

    What is only an annotation does not count.
    """
    defined = names_at_the_top(source)
    found = []
    inner = set()  # the beginnings of what is found: `a.b` of `a.b.c`
    for statement in statements:
        for part in ast.walk(statement):
            if isinstance(part, ast.AnnAssign):
                inner |= set(ast.walk(part.annotation))
            elif isinstance(part, ast.Attribute) and part not in inner:
                inner |= set(ast.walk(part.value))
                text = ast.unparse(part)
                root = text.partition(".")[0]
                is_plain = re.fullmatch(r"[\w.]+", text)
                if is_plain and (root in defined or root == "self"):
                    found.append(text)
            elif isinstance(part, ast.Name) and part.id in defined and part not in inner:
                found.append(part.id)
    return list(dict.fromkeys(found))


@functools.cache
def names_at_the_top(source: str) -> set[str]:
    """Return the names that a script defines or imports for all of its functions."""
    found = set()
    for node in parsed(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found.add(ast.unparse(target))
    return found


def outline_of(statement: ast.stmt, indent: str, comments: dict[int, str]) -> list[str]:
    """Return the lines that outline a statement and those inside of it.

    comments: {line: text}; those above the statement are taken out, and stand above its outline.
    """
    above = sorted(line for line in comments if line < statement.lineno)
    lines = [f"{indent}({comments.pop(line)})" for line in above]
    lines.append(indent + outline_of_head(statement))
    for name in ("body", "orelse", "finalbody"):
        inner = getattr(statement, name, [])
        if inner and name == "orelse":
            lines.append(f"{indent}else:")
        for part in inner:
            lines += outline_of(part, indent + "    ", comments)
    return lines


def outline_of_head(statement: ast.stmt) -> str:
    """Return the outline of a statement without the statements inside of it."""
    match statement:
        case ast.Assign():
            return f"{' = '.join(map(as_target, statement.targets))} = {brief(statement.value)}"
        case ast.AnnAssign(value=ast.expr()):
            return f"{ast.unparse(statement.target)} = {brief(statement.value)}"
        case ast.AugAssign():
            return f"{ast.unparse(statement.target)} changes by {brief(statement.value)}"
        case ast.Expr(value=ast.Yield(value=ast.expr())):
            return f"yield {brief(statement.value.value)}"
        case ast.Expr(value=ast.Yield()):
            return "yield"
        case ast.Expr():
            return brief(statement.value)
        case ast.Return(value=ast.expr()):
            return f"return {brief(statement.value)}"
        case ast.Raise():
            return f"raise {brief(statement.exc)}"
        case ast.For():
            return f"for {as_target(statement.target)} in {brief(statement.iter)}:"
        case ast.While():
            return f"while {brief(statement.test)}:"
        case ast.If():
            return f"if {brief(statement.test)}:"
        case ast.With():
            return f"with {', '.join(brief(item.context_expr) for item in statement.items)}:"
    return ast.unparse(statement).splitlines()[0]  # such as break, or the head of a function


def brief(value: ast.expr) -> str:
    """Return an expression as text, but with "… (from a, b)" for what is computed from a and b."""
    match value:
        case ast.Name() | ast.Constant() | ast.List(elts=[]) | ast.Dict(keys=[]):
            return ast.unparse(value)
        case ast.Attribute(value=ast.Name()):
            return ast.unparse(value)
        case ast.Tuple():
            return ", ".join(map(brief, value.elts))
        case ast.Call() if re.fullmatch(r"(super\(\))?[\w.]+", ast.unparse(value.func)):
            return f"{ast.unparse(value.func)}(…)" if value.args or value.keywords else (
                ast.unparse(value))
        case ast.ListComp(generators=[part]):
            return f"[{brief(value.elt)} for {as_target(part.target)} in {brief(part.iter)}]"
    names = variables_in(value)
    return f"… (from {', '.join(names)})" if names else "…"


def as_target(target: ast.expr) -> str:
    """Return what is assigned to as text, a tuple without parentheses."""
    if isinstance(target, ast.Tuple):
        return ", ".join(map(ast.unparse, target.elts))
    return ast.unparse(target)


def variables_in(value: ast.expr) -> list[str]:
    """Return the variables and attributes that an expression computes with, in their order."""
    called = [part.func for part in ast.walk(value) if isinstance(part, ast.Call)]
    own = {part.id for part in ast.walk(value)
           if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    inside = [inner for part in ast.walk(value) if isinstance(part, ast.Attribute)
              for inner in ast.walk(part.value)]
    parts = [part for part in ast.walk(value)
             if isinstance(part, (ast.Name, ast.Attribute))
             and part not in called and part not in inside]
    parts.sort(key=lambda part: (part.lineno, part.col_offset))
    texts = dict.fromkeys(ast.unparse(part) for part in parts)
    return [text for text in texts
            if re.fullmatch(r"[\w.]+", text) and text.partition(".")[0] not in own]


def taken_out(source: str, chosen: list[Technique], original: str = "") -> str:
    """Return a source with `raise NotImplementedError("name")` for each chosen technique's body.

    source: the original's or a learner's. original: the source that hints are made from, or "" for
    no hints.
    """
    lines = source.splitlines(keepends=True)
    nodes = functions_of(parsed(source))
    # From the last to the first, so that the line numbers of those above stay valid.
    for technique in sorted(chosen, key=lambda technique: -nodes[technique.name].lineno):
        node = nodes[technique.name]
        where = body_lines(node)
        indent = " " * (node.col_offset + 4)
        line_end = "\r\n" if lines[where.start - 1].endswith("\r\n") else "\n"
        new_lines = [f'{indent}raise NotImplementedError("{technique.name}"){line_end}']
        if original:
            new_lines[:0] = [f"{indent}# {line}{line_end}" for line in hint(technique, original)]
        lines[where.start - 1:where.stop - 1] = new_lines
    return "".join(lines)


# -------------------------------------------------------------------- the files of an exercise

TAKEN_OUT = ".exercises"  # the file in a learner's folder that says what was taken out
MARK = "\ufeff"  # which some editors put at the beginning of a file


def taken_out_before(folder: Path) -> list[str]:
    """Return the techniques, as script.name, that were taken out of the scripts in a folder."""
    path = folder / TAKEN_OUT
    return read(path).split() if path.is_file() else []


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, even if the disk is full. Its line ends are text's."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8", newline="")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_exercise(target: Path, text: str, names: list[str]) -> None:
    """Write an exercise, and note that these techniques (as script.name) are out of it.

    A folder that this makes is ignored by git. OSError if something cannot be written.
    """
    folder = target.parent
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if is_new:
        replace_file(folder / ".gitignore", "*\n")
    replace_file(target, text)
    known = dict.fromkeys([*taken_out_before(folder), *names])
    replace_file(folder / TAKEN_OUT, "".join(f"{name}\n" for name in known))


class Refusal(Exception):
    """The words that say why an exercise cannot be made."""


def exercise_in(target: Path, script: str, wanted: str,
                hints: bool) -> tuple[str, list[str], list[str]]:
    """Return the text of an exercise, and the names of the techniques that are out of it.

    Those names are in two lists: what this takes out, and what was out before.
    wanted: a technique or a class; "" for all. Refusal if it cannot be made.
    """
    source = source_of(script)
    chosen = techniques(source)
    if wanted:
        chosen = [technique for technique in chosen
                  if technique.name == wanted or technique.name.startswith(wanted + ".")]
    if not chosen:
        raise Refusal(f"{script} has no technique {wanted!r}; --list {script} names them")
    if target.exists():
        if target.samefile(ROOT / target.name):
            raise Refusal(f"{target} is the original; choose another folder")
        if not wanted:
            raise Refusal(f"{target} exists and is left alone; choose another folder, move the "
                          f"file, or name one technique, as in {script}.{chosen[0].name}")
        source = learners_source(target)
        check_unwritten(source.removeprefix(MARK), chosen, target)
    names = [technique.name for technique in chosen]
    nodes = functions_of(parsed(source.removeprefix(MARK)))
    before = [technique.name for technique in techniques(source_of(script))
              if technique.name not in names and technique.name in nodes
              and not is_written(nodes[technique.name])]
    text = taken_out(source.removeprefix(MARK), chosen, source_of(script) if hints else "")
    if source.startswith(MARK):
        text = MARK + text
    return text, names, before


def learners_source(target: Path) -> str:
    """Return the source of a learner's script, with its line ends and the mark at its beginning.

    Refusal if it has an error.
    """
    try:
        source = target.read_bytes().decode("utf-8")
        parsed(source.removeprefix(MARK))
    except SyntaxError as error:
        raise Refusal(f"{target} line {error.lineno}: {type(error).__name__}: {error.msg}; mend it "
                      "first") from None
    except ValueError as error:
        raise Refusal(f"{target} cannot be read: {error}") from None
    return source


def check_unwritten(source: str, chosen: list[Technique], target: Path) -> None:
    """Refusal if the learner's source has a body of its own for a technique, or has it not."""
    nodes = functions_of(parsed(source))
    for technique in chosen:
        node = nodes.get(technique.name)
        if node is None:
            raise Refusal(f"{target} has no function {technique.name}; put its def line back")
        if is_written(node) and code_of(node) != code_of(technique.node):
            raise Refusal(f"{target} line {node.lineno}: {technique.name} is your own and is left "
                          "alone; to begin again, replace its body by "
                          f"raise NotImplementedError({technique.name!r})")


# ----------------------------------------------------------------------------------- the list

class Paper(NamedTuple):
    """An entry in the list of papers of a script."""

    text: str  # such as "Dao et al. 2022, arXiv:2205.14135"
    sections: list[int]


def papers(source: str) -> list[Paper]:
    """Return the papers in the list at the end of a script's docstring.

    An entry is one or more papers with "; " between them, followed by its sections:

        Dao et al., FlashAttention, 2022, arXiv:2205.14135      sections 1, 3
    """
    docstring = ast.get_docstring(parsed(source))
    listed = re.split(r"^The papers.*\n", docstring, maxsplit=1, flags=re.M)[-1]
    one_entry_a_line = re.sub(r"\n    +", " ", listed)
    found = []
    for entry, numbers in re.findall(r"(.+?) +sections? ([\d, ]+)(?:\n|\Z)", one_entry_a_line):
        numbers = [int(number) for number in re.findall(r"\d+", numbers)]
        found += [Paper(cited(paper), numbers) for paper in entry.strip().split("; ")]
    return found


def cited(paper: str) -> str:
    """Return a paper as its authors, its year and its address."""
    authors = paper.split(",")[0]
    year = re.search(r"(?<![\d.])(?:19|20)\d\d(?![\d.])", paper)
    if year and not authors.endswith(year[0]):
        authors = f"{authors} {year[0]}"
    address = re.search(r"(?:arXiv:)?\d{4}\.\d{5}|\b[\w-]+(?:\.[\w-]+)+/[^\s,]+", paper)
    if not address:
        return authors
    if re.match(r"\d{4}\.", address[0]):
        return f"{authors}, arXiv:{address[0]}"
    return f"{authors}, {address[0]}"


TESTS = ROOT / "tests" / "tools" / "tests_of_techniques.txt"


def listed_tests() -> dict[str, str]:
    """Return {script.technique: a test that fails if it is broken}, as find_tests.py found it."""
    text = read(TESTS) if TESTS.is_file() else ""
    pairs = [line.split() for line in text.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def list_of(script: str) -> str:
    """Return the techniques of a script, section by section, with tests and papers, as text."""
    source = source_of(script)
    tests = listed_tests()
    lines = [f"{script}.py, tested by tests/test_{script}.py"]
    section = 0
    titles = [title for title, _ in sections(source)]
    cited_papers = papers(source)
    for technique in techniques(source):
        if technique.section != section:
            section = technique.section
            lines += ["", f"{section}. {titles[section - 1]}"]
            lines += [f"   {paper.text}" for paper in cited_papers if section in paper.sections]
        name = f"{script}.{technique.name}"
        lines.append(f"   {name:<42}  {tests.get(name, '')}".rstrip())
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------- the command line

def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="exercise.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="", help="a script, or script.technique")
    parser.add_argument("folder", nargs="?", type=Path, help="where the exercise goes")
    parser.add_argument("--hint", action="store_true",
                        help="leave an outline of each body: its steps, and what it uses")
    parser.add_argument("--list", action="store_true",
                        help="list the techniques (of one script, or of all) and stop")
    return parser


def answer(arguments: argparse.Namespace) -> str:
    """Do what the command line asks for, and return what is to be printed.

    Refusal if it cannot be done, OSError if a file cannot be written.
    """
    if arguments.list and not arguments.what:
        return "\n".join(map(list_of, NAMES))
    if not arguments.what:
        what_it_does, examples, *_ = __doc__.split("\n\n")
        what_it_does = textwrap.fill(what_it_does, WIDTH - len("exercise.py: "))
        raise Refusal(f"{what_it_does}\n\n{examples}\n\n"
                      f"The scripts are {', '.join(NAMES)}.\n--help says more.")
    script, _, wanted = arguments.what.removesuffix(".py").partition(".")
    if script not in NAMES:
        raise Refusal(f"the scripts are {', '.join(NAMES)}; not {script!r}")
    if arguments.list and wanted:
        raise Refusal(f"--list takes a script: exercise.py --list {script}")
    if arguments.list:
        return list_of(script)
    if arguments.folder is None:
        raise Refusal(f"give a folder for the exercise, as in: exercise.py {arguments.what} my/")
    target = arguments.folder / f"{script}.py"
    text, names, before = exercise_in(target, script, wanted, arguments.hint)
    write_exercise(target, text, [f"{script}.{name}" for name in names])
    to_write = f"{target}: {len(names)} to write: {', '.join(names)}."
    if before:
        to_write += f" Still to write from before: {', '.join(before)}."
    to_write = textwrap.fill(to_write, WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{to_write}\n{how_to_grade(script, names, arguments.folder)}"


def how_to_grade(script: str, names: list[str], folder: Path) -> str:
    """Return the lines with the commands that grade the techniques of a script in a folder."""
    where = ""
    if Path.cwd() != ROOT:
        where = f", in the folder {ROOT},"
        folder = folder.resolve()
        if folder.is_relative_to(ROOT):
            folder = folder.relative_to(ROOT)
    command = f"{python_with_pytest()} -m pytest --impl={folder}"
    lines = f"Grade it{where} with:\n    {command}\n"
    tests = listed_tests()
    for name in names:
        test = tests.get(f"{script}.{name}")
        if test:
            return f"{lines}One test of {name} alone is quicker:\n    {command} -k {test}\n"
    return lines


def python_with_pytest() -> str:
    """Return how to start Python in the environment that the README makes, or else python3."""
    for path in (Path(".venv/bin/python"), Path(".venv/Scripts/python.exe")):
        if (ROOT / path).exists():
            return str(path)
    return "python3"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        text = answer(arguments)
    except Refusal as refusal:
        print(f"exercise.py: {refusal}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"exercise.py: cannot write in {arguments.folder}: {error.strerror}", file=sys.stderr)
        return 2
    return write_out(text)


def write_out(text: str) -> int:
    """Print a text and return the exit status."""
    try:
        print(text, end="", flush=True)
        return 0
    except OSError as error:
        return told_in_one_line(error, "exercise.py")


def told_in_one_line(error: OSError, program: str) -> int:
    """Say on stderr that stdout takes nothing more, and return the exit status.

    A reader who closes the pipe wants nothing more: that is no error.
    """
    # Closing stdout must not fail a second time.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 0
    print(f"{program}: cannot print: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
