"""Import a learner's script as a module, or say in one line why that cannot be.

A script may end Python or never end while it is imported. So it is tried in a process of its own:

    python3 tests/tools/importing.py microflash my/microflash.py 5

The last argument is how many seconds importing it may take. That process ends with status 0, or
with status 1 and one line, such as

    line 31: SyntaxError: '(' was never closed
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType

ROOT = Path(__file__).resolve().parents[2]  # of the project
sys.path.insert(0, str(ROOT))
from tests.tools.exercise import Technique, functions_of, parsed, read, source_of, techniques  # noqa: E402

LONGEST_IMPORT = 5  # seconds
MARK = "__followed__"  # the name, in a learner's module, of what every technique is decorated with


def problem_of(script: str, path: Path, longest: float = LONGEST_IMPORT) -> str | None:
    """Return None if the script at path can be imported, or else a line that says why not.

    longest: how many seconds it may take.
    """
    command = [sys.executable, str(Path(__file__)), script, str(path), str(longest)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    lines = done.stderr.splitlines() or [""]
    if lines[-1] == "imported":
        return None
    if done.returncode == 1:
        return lines[-1]
    return f"it ends Python, with status {done.returncode}, when it is imported"


def missing(script: str, source: str) -> list[Technique]:
    """Return the techniques of a script that a learner's source has no definition of."""
    defined = functions_of(parsed(source))
    return [technique for technique in techniques(source_of(script))
            if technique.name not in defined]


def imported(script: str, path: Path, follow: Callable) -> ModuleType:
    """Import a learner's script under the script's own name, and return the module.

    Each technique in it is decorated with follow(name), the outermost decorator. A technique that
    the learner has deleted is there, but not written.
    """
    source = read(path)
    tree = ast.parse(source, str(path))
    add_missing(tree, missing(script, source))
    names = {technique.name for technique in techniques(source_of(script))}
    for name, node in functions_of(tree).items():
        if name in names:
            decorator = ast.parse(f"{MARK}({name!r})", mode="eval").body
            node.decorator_list.insert(0, decorator)
    ast.fix_missing_locations(tree)

    module = ModuleType(script)
    module.__file__ = str(path)
    vars(module)[MARK] = follow
    sys.modules[script] = module  # dataclasses look their module up there
    exec(compiled(tree, str(path)), vars(module))
    return module


def add_missing(tree: ast.Module, absent: list[Technique]) -> None:
    """Add functions that are not written to a script's tree, above all others."""
    for technique in absent:
        class_name, _, name = technique.name.rpartition(".")
        stub = ast.parse(f"def {name}(*arguments, **options):\n"
                         f"    raise NotImplementedError({technique.name!r})").body[0]
        if not class_name:
            owner = tree
        else:
            owner = next((node for node in tree.body
                          if isinstance(node, ast.ClassDef) and node.name == class_name), None)
        if owner is None:
            continue
        if is_property(technique.node):
            stub.decorator_list.append(ast.Name("property", ast.Load()))
        definitions = (ast.FunctionDef, ast.ClassDef)
        first = next((i for i, node in enumerate(owner.body) if isinstance(node, definitions)),
                     len(owner.body))
        owner.body.insert(first, stub)


def is_property(node: ast.FunctionDef) -> bool:
    """Return whether a method is a property."""
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def compiled(tree: ast.Module, filename: str):
    """Return the code of a script's tree, in which annotations are not computed."""
    return compile(tree, filename, "exec", flags=annotations.compiler_flag,
                   dont_inherit=True)


# -------------------------------------------------------------------- in the process that tries

def explanation(error: BaseException, path: Path) -> str:
    """Return one line about an error that importing the script at path raised."""
    text = str(error).replace("\n", " ")
    kind = type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        line = path.read_bytes()[:error.start].count(b"\n") + 1
        byte = error.object[error.start]
        return f"line {line}: it is not UTF-8: byte {byte:#04x}; save the file as UTF-8"
    if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
        return f"line {error.lineno}: {kind}: {error.msg}"
    if isinstance(error, SystemExit):
        text = "it ends Python when it is imported"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{kind}: {text}"


def stop_after(seconds: float, path: Path) -> None:
    """End this process if it runs longer, with a line that says where the script is then."""
    main_thread = threading.get_ident()

    def stop():
        frame: FrameType | None = sys._current_frames()[main_thread]
        while frame is not None and frame.f_code.co_filename != str(path):
            frame = frame.f_back
        where = f"line {frame.f_lineno}: " if frame else ""
        leave(1, f"{where}importing it takes more than {seconds:g} seconds; does this loop end?")

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()


def leave(status: int, line: str) -> None:
    """Print a line on stderr and end this process, whatever still runs."""
    sys.__stderr__.write(f"\n{line}\n")
    sys.__stderr__.flush()
    os._exit(status)


def main() -> None:
    script = sys.argv[1]
    path = Path(sys.argv[2])
    sys.path.insert(0, str(path.parent))
    stop_after(float(sys.argv[3]), path)
    try:
        imported(script, path, lambda name: lambda function: function)
    except BaseException as error:
        leave(1, explanation(error, path))
    leave(0, "imported")


if __name__ == "__main__":
    sys.__stderr__.reconfigure(encoding="utf-8", errors="replace")
    main()
