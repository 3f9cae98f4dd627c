"""The exercise maker, the grades of `pytest --impl`, and the parts of the README that are made."""

import ast
import contextlib
import copy
import functools
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools import exercise, find_tests, grading, importing, readme
from tests.tools.exercise import (
    NAMES,
    ROOT,
    Paper,
    code_of,
    floors,
    functions_of,
    hint,
    listed_tests,
    names_that_main_needs,
    papers,
    parsed,
    python_with_pytest,
    sections,
    source_of,
    taken_out,
    taken_out_before,
    techniques,
)
from tests.tools.grading import (
    MISTAKES,
    Grade,
    Grader,
    NeverEnds,
    difference,
    line_for,
    time_limit,
)
from tests.tools.importing import problem_of

EXERCISE = ROOT / "tests" / "tools" / "exercise.py"
FIND_TESTS = ROOT / "tests" / "tools" / "find_tests.py"
BENCHMARK = ROOT / "tests" / "tools" / "benchmark.py"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Sections that are quick to print in a script that trains a model first.
QUICK_SECTIONS = {
    "microkv": ["--section", "2,11"],
    "microquant": ["--section", "3,4"],
    "microbeam": ["--section", "1,2"],
}
QUICK_OPTIONS = {"microbeam": ["--steps", "1"]}

each_name = pytest.mark.parametrize("name", NAMES)


def run(*command, cwd=ROOT):
    """Return the finished process of a command."""
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd)


def make(*arguments, cwd=ROOT):
    """Return what the exercise maker does, as if it were a finished process."""
    out = io.StringIO()
    errors = io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors),
          contextlib.chdir(cwd)):
        try:
            status = exercise.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


def functions_and_methods(text):
    """Return {name or Class.name: node} of all functions and methods of a script."""
    return functions_of(parsed(text))


lines_of_text = functools.cache(str.splitlines)


def text_of(node, text):
    """Return the lines of a function or method in the script with this text."""
    return lines_of_text(text)[node.lineno - 1:node.end_lineno]


def docstrings(text):
    """Return the docstrings of a script, and of its classes, functions and methods."""
    tree = parsed(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    documented = [tree, *classes, *functions_and_methods(text).values()]
    return [ast.get_docstring(node) for node in documented]


def comments(text):
    """Return the lines that are comments at the left margin."""
    return [line for line in text.splitlines() if line.startswith("#")]


# ------------------------------------------------------------------- what stands where in a script

FLOORS = '''
# ==================
# THE TECHNIQUES: one or two
# ==================

# 1. Adding
#
# 2. This is a list in the prose.

def add(a, b):
    return a + b
def show_add_early(trace, knobs):
    pass
def check_numbers(a, b):
    pass
def _private():
    pass
def width(a):
    return len(a)

# 2. Counting

class Counter:
    def __init__(self):
        self.n = 0
    def count(self):
        self.n += 1

# ==================
# THE EXPERIMENTS
# ==================

# 1. Adding

def compare_sums():
    return add(1, 2)

# ==================
# THE MODEL AND THE BENCH
# ==================

SECTIONS = [
    Section("Adding", show_add, [add], core=False),
    Section(title="Counting", show=show_count, techniques=[Counter]),
]
def check_knobs(knobs):
    width(knobs)
def main():
    check_knobs("abc")
    later = lambda: add(1, 2)
'''


def test_sections_are_read_from_calls():
    assert sections(FLOORS) == [("Adding", ["add"]), ("Counting", ["Counter"])]


def test_floors_reach_from_heading_to_heading():
    lines = FLOORS.splitlines()
    found = floors(FLOORS)
    assert list(found) == ["THE TECHNIQUES", "THE EXPERIMENTS", "THE MODEL AND THE BENCH"]
    assert [lines[span.start - 1] for span in found.values()] == [
        "# THE TECHNIQUES: one or two", "# THE EXPERIMENTS", "# THE MODEL AND THE BENCH"]
    assert found["THE TECHNIQUES"].stop == found["THE EXPERIMENTS"].start


def test_techniques_are_what_the_first_floor_has_for_the_learner():
    found = [(technique.name, technique.section) for technique in techniques(FLOORS)]
    assert found == [("add", 1), ("Counter.count", 2)]


@each_name
def test_what_the_sections_name_on_the_first_floor_is_an_exercise(name):
    source = source_of(name)
    first_floor = floors(source)["THE TECHNIQUES"]
    exercises = {technique.name for technique in techniques(source)}
    named = {function for _, functions in sections(source) for function in functions}
    named -= names_that_main_needs(parsed(source))
    for function, node in functions_and_methods(source).items():
        if function in named and node.lineno in first_floor:
            assert function in exercises


# ----------------------------------------------------------------------------- the exercise maker

@each_name
def test_an_exercise_takes_out_the_techniques_and_nothing_else(name):
    original = source_of(name)
    chosen = techniques(original)
    names = {technique.name for technique in chosen}
    left = taken_out(original, chosen)

    before = functions_and_methods(original)
    after = functions_and_methods(left)
    assert before.keys() == after.keys()
    for function in before:
        if function in names:
            assert code_of(after[function]) == f"raise NotImplementedError('{function}')"
        else:
            assert text_of(after[function], left) == text_of(before[function], original)
    assert docstrings(left) == docstrings(original)
    assert comments(left) == comments(original)

    assert len(names) >= 20
    assert not any(function.startswith("show_") for function in names)


@each_name
def test_a_half_done_script_prints_its_trace_all_the_same(name, tmp_path, capsys):
    original = source_of(name)
    path = tmp_path / f"half_{name}.py"
    path.write_text(taken_out(original, techniques(original)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)

    options = QUICK_OPTIONS.get(name, [])
    assert module.main([*options, *QUICK_SECTIONS.get(name, [])]) == 1
    out = capsys.readouterr().out
    sections_in_trace = re.findall(r"^── (\d+) ── ", out, re.M)
    n_sections = len(sections_in_trace)
    waiting = re.findall(r"^Not written yet: \S+\. This section goes on", out, re.M)
    assert n_sections > 1
    assert len(waiting) == n_sections
    numbers = ", ".join(sections_in_trace)
    assert f" Sections {numbers} wait for a function. " in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "FAIL" not in out

    assert module.main([*options, "--section", sections_in_trace[-1]]) == 1
    out = capsys.readouterr().out
    assert f"\nSection {sections_in_trace[-1]} waits for a function.\n" in out


@each_name
def test_hints_say_something_and_are_comments(name):
    original = source_of(name)
    hinted = taken_out(original, techniques(original), original)
    nodes = functions_and_methods(hinted)
    for technique in techniques(original):
        lines = hint(technique, original)
        assert len(lines) > 1
        assert all(len(line) <= 80 for line in lines)
        assert code_of(nodes[technique.name]) == f"raise NotImplementedError('{technique.name}')"
        above = text_of(nodes[technique.name], hinted)[-1 - len(lines):-1]
        assert [line.strip() for line in above] == [f"# {line}".strip() for line in lines]


HINTED = '''
import math

# ==================
# THE TECHNIQUES
# ==================

# 1. Sums

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))

def norms(rows, scale=1):
    """Return how long the rows are."""
    if scale <= 0:
        raise ValueError("scale must be positive")
    found = []
    for i, row in enumerate(rows):
        # Half of the work is done twice.
        square: float = dot(row, row) / scale
        found.append(math.sqrt(square))
    found += [x * scale for x in rows[0]]
    super().keep(found)
    rows.lengths.extend(found)
    return found, rows[-1] if rows else scale

# ==================
# THE EXPERIMENTS
# ==================

SECTIONS = [Section("Sums", show_sums, [dot, norms])]
'''


def test_a_hint_outlines_the_body_and_names_what_it_uses():
    dot, norms = techniques(HINTED)
    assert hint(dot, HINTED) == ["1 line in the original", "return sum(…)"]
    assert hint(norms, HINTED) == [
        "11 lines in the original, with dot, math.sqrt",
        "if … (from scale):",
        "    raise ValueError(…)",
        "found = []",
        "for i, row in enumerate(…):",
        "    (Half of the work is done twice.)",
        "    square = … (from row, scale)",
        "    found.append(…)",
        "found changes by [… (from x, scale) for x in … (from rows)]",
        "super().keep(…)",
        "rows.lengths.extend(…)",
        "return found, … (from rows, scale)",
    ]


def test_one_technique_is_taken_out(tmp_path):
    folder = tmp_path / "a" / "my"
    done = run(sys.executable, EXERCISE, "microflash.flash_attention", folder)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "1 to write: flash_attention." in done.stdout.replace("\n", " ")
    command = f"{python_with_pytest()} -m pytest --impl={folder}"
    test = listed_tests()["microflash.flash_attention"]
    assert done.stdout.endswith(
        f"\nGrade it with:\n    {command}\n"
        f"One test of flash_attention alone is quicker:\n    {command} -k {test}\n")
    written = (folder / "microflash.py").read_text(encoding="utf-8")
    assert written.count("raise NotImplementedError(") == 1


def test_the_environment_of_the_readme_grades_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(exercise, "ROOT", tmp_path)
    assert python_with_pytest() == "python3"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert python_with_pytest() == os.path.join(".venv", "bin", "python")


def test_only_a_new_folder_gets_an_ignore_file(tmp_path):
    new = tmp_path / "my"
    assert make("microflash.absorb", new).returncode == 0
    assert (new / ".gitignore").read_text(encoding="utf-8") == "*\n"
    assert make("microflash.absorb", tmp_path).returncode == 0
    assert not (tmp_path / ".gitignore").exists()


def test_one_more_technique_is_taken_out_of_a_learner_s_file(tmp_path):
    path = tmp_path / "microflash.py"
    assert make("microflash.finish", tmp_path).returncode == 0
    mine = path.read_text(encoding="utf-8")
    mine = mine.replace('raise NotImplementedError("finish")', "return mine  # my own")
    mine = mine.replace("import math\n", "import math  # a comment of mine\n\n\n")
    path.write_text(mine, encoding="utf-8")

    done = make("microflash.absorb", tmp_path)
    assert done.returncode == 0
    absorb = next(technique for technique in techniques(mine) if technique.name == "absorb")
    expected = mine.replace(absorb.body, '    raise NotImplementedError("absorb")\n')
    assert path.read_text(encoding="utf-8") == expected
    assert taken_out_before(tmp_path) == ["microflash.finish", "microflash.absorb"]

    assert "1 to write: absorb. Grade" in " ".join(done.stdout.split())

    # A second time nothing changes, but --hint leaves its hint.
    assert make("microflash.absorb", tmp_path).returncode == 0
    assert path.read_text(encoding="utf-8") == expected
    assert make("--hint", "microflash.absorb", tmp_path).returncode == 0
    assert len(path.read_text(encoding="utf-8")) > len(expected)

    # What is still to write from before is named with what is new.
    said = " ".join(make("microflash.log_sum_exp", tmp_path).stdout.split())
    assert "1 to write: log_sum_exp. Still to write from before: absorb. Grade" in said


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["without a mark", "with a mark"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_learner_s_file_keeps_its_line_ends_and_its_mark(mark, line_end, tmp_path):
    path = tmp_path / "microflash.py"
    assert make("microflash.finish", tmp_path).returncode == 0
    mine = mark + path.read_bytes().replace(b"\n", line_end)
    path.write_bytes(mine)
    assert make("--hint", "microflash.absorb", tmp_path).returncode == 0
    changed = path.read_bytes()
    absorb = next(technique for technique in techniques(source_of("microflash"))
                  if technique.name == "absorb")
    before, after = mine.split(absorb.body.encode().replace(b"\n", line_end))
    assert changed.startswith(before)
    assert changed.endswith(after)
    inserted = changed[len(before):-len(after)]
    assert inserted.endswith(b'    raise NotImplementedError("absorb")' + line_end)
    assert inserted.count(b"\n") == inserted.count(line_end) > 1  # a hint, and this


def refused(done):
    """Return the only line of a refusal."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("what", ["microflash", "microflash.py", "microflash.absorb"])
def test_a_learner_s_work_is_left_alone(what, tmp_path):
    path = tmp_path / "microflash.py"
    assert make("microflash.absorb", tmp_path).returncode == 0
    text = path.read_text(encoding="utf-8")
    text = text.replace('raise NotImplementedError("absorb")', "return mine")
    path.write_text(text, encoding="utf-8")
    refusal = refused(make("--hint", what, tmp_path))
    assert "left alone" in refusal
    if what.endswith("absorb"):
        assert "to begin again, replace its body by raise NotImplementedError('absorb')" in refusal
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text, problem", [
    (b"x = (", "line 1: SyntaxError: '(' was never closed"),
    ("é".encode("latin-1"), "cannot be read: 'utf-8'"),
    (b"", "has no function absorb"),
])
def test_a_learner_s_file_with_an_error_is_refused(text, problem, tmp_path):
    path = tmp_path / "microflash.py"
    path.write_bytes(text)
    assert problem in refused(make("microflash.absorb", tmp_path))
    assert path.read_bytes() == text


def test_nothing_is_taken_out_of_the_original(tmp_path):
    assert "is the original" in refused(make("microflash.absorb", ROOT))
    assert "is the original" in refused(make("microflash", "."))


def test_the_exercise_maker_has_examples_for_who_asks_for_nothing():
    done = make()
    assert done.returncode == 2
    assert "\n    python3 tests/tools/exercise.py microflash my/ " in done.stderr
    assert f"The scripts are {', '.join(NAMES)}." in done.stderr
    assert done.stderr.count("\n") < 12


@pytest.mark.parametrize("code", [
    "raise NotImplementedError", "raise NotImplementedError('f')", "pass", "...", '"""It."""'])
def test_what_is_not_written_yet(code):
    assert not exercise.is_written(functions_of(parsed(f"def f():\n    {code}\n"))["f"])


@pytest.mark.parametrize("arguments", [
    ["microfish", "my"],
    ["microflash.nothing", "my"],
    ["microflash"],
    ["microflash.show_standard", "my"],
    ["microflash", "/dev/null/my"],
])
def test_the_exercise_maker_refuses_in_one_line(arguments, tmp_path):
    refused(make(*arguments, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


on_posix = pytest.mark.skipif(os.name != "posix", reason="needs a shell")


@on_posix
def test_a_full_disk_leaves_no_half_of_a_file(tmp_path):
    path = tmp_path / "microflash.py"
    make_on_full_disk = f'ulimit -f 20; "{sys.executable}" "{EXERCISE}" microflash.absorb .'
    assert "cannot write" in refused(run("bash", "-c", make_on_full_disk, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []

    assert make("microflash.finish", tmp_path).returncode == 0
    before = path.read_bytes()
    assert "cannot write" in refused(run("bash", "-c", make_on_full_disk, cwd=tmp_path))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [".exercises", "microflash.py"]


@on_posix
def test_the_list_ends_quietly_where_nobody_reads_it():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, EXERCISE, "--list", "microattention"],
                          stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@on_posix
def test_the_list_says_in_one_line_that_the_disk_is_full():
    list_one = f'"{sys.executable}" "{EXERCISE}" --list microattention'
    full = run("bash", "-c", f"{list_one} > /dev/full")
    assert full.returncode == 1
    assert full.stderr == "exercise.py: cannot print: No space left on device\n"


@on_posix
def test_the_benchmark_has_help_and_ends_in_one_line():
    help_text = run(sys.executable, BENCHMARK, "--help")
    assert help_text.returncode == 0
    assert help_text.stdout.startswith("usage: benchmark.py")
    full = run("bash", "-c", f'"{sys.executable}" -u "{BENCHMARK}" > /dev/full')
    assert full.returncode == 1
    assert full.stderr == "benchmark.py: cannot print: No space left on device\n"


# ------------------------------------------------------------------------ importing what is broken

@pytest.mark.parametrize("text, problem", [
    ("\nx = (", "line 2: SyntaxError: '(' was never closed"),
    ("x = 1\n  y = 2", "line 2: IndentationError: unexpected indent"),
    ("def f():\n    return 1 / 0\nf()", "line 2: ZeroDivisionError: division by zero"),
    ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("\nexit()", "line 2: SystemExit: it ends Python when it is imported"),
    ("import os\nos._exit(0)", "it ends Python, with status 0, when it is imported"),
    ("import time\nwhile True:\n    time.sleep(0.01)",
     "line 3: importing it takes more than 0.5 seconds; does this loop end?"),
    ("print('hello')\nx = input()", "line 2: EOFError: EOF when reading a line"),
    ("\ufeffx = 1", None),
    ("def attention():\n    return 1", None),
])
def test_what_is_wrong_with_a_script_is_told_in_one_line(text, problem, tmp_path):
    path = tmp_path / "microattention.py"
    path.write_text(text, encoding="utf-8")
    found = problem_of("microattention", path, longest=0.5)
    if problem is None:
        assert found is None
    else:
        assert found.endswith(problem)
        assert found.startswith(("line ", "it ends"))


def test_a_script_that_is_not_utf_8_is_told_its_line(tmp_path):
    path = tmp_path / "microattention.py"
    path.write_bytes("x = 1\n# é".encode("latin-1"))
    found = problem_of("microattention", path)
    assert found == "line 2: it is not UTF-8: byte 0xe9; save the file as UTF-8"


# ------------------------------------------------------------------------------------ the grades

def with_bodies(script, edits):
    """Return a script in which some bodies are replaced.

    edits: {technique: its new body, or None if it is not written yet}.
    """
    original = source_of(script)
    chosen = [technique for technique in techniques(original) if technique.name in edits]
    assert len(chosen) == len(edits)
    text = taken_out(original, chosen)
    for technique, body in edits.items():
        if body is not None:
            text = text.replace(f'raise NotImplementedError("{technique}")', body)
    return text


def graded(folder, *arguments, cwd=ROOT):
    """Return the process that grades a folder, and its report."""
    done = run(*PYTEST, f"--impl={folder}", *arguments, cwd=cwd)
    assert "Traceback" not in done.stdout
    assert "INTERNALERROR" not in done.stdout
    assert done.stderr == ""
    assert "FFF" not in done.stdout  # no letters for the tests
    assert all(len(line) <= 80 or str(folder) in line for line in done.stdout.splitlines())
    return done, done.stdout


def grade(folder, edits, *arguments, script="microattention"):
    """Grade a script in which some bodies are replaced. Return the process and its report."""
    (folder / f"{script}.py").write_text(with_bodies(script, edits), encoding="utf-8")
    return graded(folder, *arguments)


def body(script, wanted):
    """Return the body of a technique as the original has it."""
    for technique in techniques(source_of(script)):
        if technique.name == wanted:
            return technique.body.strip()
    raise ValueError(f"{script} has no technique {wanted}")


def own_body(script, wanted):
    """Return a body that does what the original does, with other code."""
    return "pass\n" + " " * (8 if "." in wanted else 4) + body(script, wanted)


def without_refusals(script, wanted):
    """Return a body that does what the original does, but returns [] where that refuses."""
    original = own_body(script, wanted)
    changed = re.sub(r"raise ValueError\(.*?\"\)", "return []", original, flags=re.S)
    assert changed != original
    return changed


def edits_of_three():
    """Return {script: {technique: its new body}} for three scripts."""
    return {
        "microattention": {
            # Right for powers of two only.
            "alibi_slopes": "return [2.0 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)]",
            "alibi_bias": body("microattention", "alibi_bias"),
            "mean_pool_kv_heads": own_body("microattention", "mean_pool_kv_heads"),
            "rope": own_body("microattention", "rope"),
            "kv_bytes_per_token": None,
            "cache_bytes": None,
            # attention calls visible_weights and that calls visible_keys.
            "attention": own_body("microattention", "attention"),
            "attention_weights": "return nonsense",
            "visible_weights": None,
            "visible_keys": "return [0]",
            "grouped_query_attention": own_body("microattention", "grouped_query_attention"),
        },
        "microflash": {
            # It keeps something in its own way, and so does store.
            "Traffic.load": "self.mine = getattr(self, 'mine', 0)\n        "
                            + body("microflash", "Traffic.load"),
        },
        "microkv": {
            "BlockPool.allocate": own_body("microkv", "BlockPool.allocate"),
            "BlockPool.share": own_body("microkv", "BlockPool.share"),
            "BlockPool.num_free_blocks": own_body("microkv", "BlockPool.num_free_blocks"),
            # A freed block goes to the wrong end.
            "BlockPool.free": """self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.free_blocks[block] = None
            self.free_blocks.move_to_end(block, last=False)""",
            # Their bodies call super().
            "CachingEngine.run_model": own_body("microkv", "CachingEngine.run_model"),
            "SwappingEngine.preempt": own_body("microkv", "SwappingEngine.preempt"),
            "DecodeEngine.admit": own_body("microkv", "DecodeEngine.admit"),
            "CachingEngine.admit": "return super().admit(state, budget)",  # finds no prefix
        },
    }


def with_more_broken(text):
    """Return microflash without a function, with another constant, and with another helper."""
    gone = text[text.index("def online_softmax("):text.index("def tiles(")]
    text = text.replace(gone, "")
    text = text.replace("SRAM = 2048 ", "SRAM = 4096 ")
    return text.replace("return math.inf if math.isnan(gap) else gap", "return gap")


@pytest.fixture(scope="module")
def my_scripts(tmp_path_factory):
    """Return a folder with five scripts. Some of their techniques are right, others are not.

    In microflash more is broken than techniques, and the last two cannot be imported.
    """
    folder = tmp_path_factory.mktemp("my")
    texts = {script: with_bodies(script, edits) for script, edits in edits_of_three().items()}
    texts["microflash"] = with_more_broken(texts["microflash"])
    # What refuses an argument does so in other words.
    texts["microattention"] = texts["microattention"].replace(
        "n_kv_heads must divide n_heads", "no")
    texts["microquant"] = "import math\nimport (\n"
    texts["microbeam"] = "import math\nexit()\n"
    for script, text in texts.items():
        (folder / f"{script}.py").write_text(text, encoding="utf-8")
    (folder / ".exercises").write_text("microattention.alibi_bias\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def report(my_scripts):
    """Return the report of one run that grades all of them, started in their folder."""
    wanted = ["alibi", "bytes", "mean_pool", "tiny_example", "grouped and 3-7-12", "not_divide",
              "standard_traffic", "gap_of_matrices", "least_recently", "prefix_caching_in",
              "row_of_the_preemption", "crossing_takes_its_time"]
    done, report = graded(".", "-c", ROOT / "pyproject.toml", "-k", " or ".join(wanted), "-n", "2",
                          cwd=my_scripts)
    assert done.returncode == 1
    return report


class TestOneReport:
    """Each test reads its part of the report. A class, so that one worker makes the report once."""

    def test_it_begins_with_how_many_tests_ran(self, report):
        beginning = " ".join(report.split()).partition(" ==")[0]
        assert re.fullmatch(r"\d+ of \d+ tests match -k alibi or bytes or .*: what is right so far "
                            r"may fail in the others\. In the end, run them all\.", beginning)

    def test_grades_tell_done_from_wrong_and_unwritten(self, report, my_scripts):
        assert " microattention: 5 of 12 right so far " in report
        assert "\nnot yet  visible_weights, kv_bytes_per_token, cache_bytes\n" in report
        assert "\nno test  rope (written, but no test that ran calls it)\n" in report
        assert is_done("mean_pool_kv_heads", report)
        assert """
wrong    alibi_slopes: its test fails; the smallest call that shows it:
         alibi_slopes(3)
           yours     [0.15749, 0.024803, 0.0039062]
           expected  [0.0625, 0.0039062, 0.25]
""" in report
        # The code of the original counts as written where it was taken out.
        assert "\ndone     alibi_bias: the same code as the original's\n" in report
        text = (my_scripts / "microattention.py").read_text(encoding="utf-8")
        line = 1 + text.split("def attention_weights")[0].count("\n")
        assert f"\nNext: mend attention_weights, microattention.py line {line}.\n" in report
        # The README shows this grade.
        shown = re.search(r"```text\n(wrong .*?)```", README, re.S)[1]
        assert shown in report

    def test_a_technique_is_graded_whatever_the_others_are(self, report):
        """All others call attention, and that calls what is not written and what is wrong."""
        assert is_done("attention", report)
        assert is_done("grouped_query_attention", report)
        assert re.search(r"^wrong    visible_keys: ", report, re.M)
        shown = report.partition("\nwrong    attention_weights: ")[2].partition("\nwrong ")[0]
        assert re.search(r"^ +yours     NameError in line \d+: ", shown, re.M)

    def test_a_method_that_keeps_something_in_its_own_way_is_right(self, report):
        assert is_done("Traffic.load", report)
        assert " microflash: 1 of 2 right so far " in report

    def test_order_counts_in_a_pool_and_nobody_else_is_blamed(self, report):
        for name in ("allocate", "share", "num_free_blocks"):
            assert is_done(f"BlockPool.{name}", report)
        shown = re.search(r"^wrong    BlockPool\.free: .* the smallest call that shows\s+it:\n"
                          r" +self = BlockPool\((?:.*\n)+? +self\.free\((\d+)\)\n"
                          r" +yours     leaves free_blocks = OrderedDict\.fromkeys\(\[(.*)\]\)\n"
                          r" +expected  leaves free_blocks = OrderedDict\.fromkeys\(\[(.*)\]\)\n",
                          report, re.M)
        freed, yours, expected = shown.groups()
        assert yours.split(", ")[0] == freed == expected.split(", ")[-1]

    def test_methods_that_call_super_are_graded(self, report):
        assert re.search(r"^wrong    CachingEngine\.admit: ", report, re.M)
        for name in ("CachingEngine.run_model", "SwappingEngine.preempt", "DecodeEngine.admit"):
            assert is_done(name, report)

    def test_a_script_that_cannot_be_imported_does_not_stop_the_others(self, report):
        assert "\nmicroquant.py line 2: SyntaxError: invalid syntax\n" in report
        assert "\nmicrobeam.py line 2: SystemExit: it ends Python" in report

    def test_a_function_that_is_gone_is_to_be_written_where_it_stood(self, report, my_scripts):
        gone = "not yet online_softmax: not there: your file has no function online_softmax; "
        assert gone in " ".join(report.split())
        text = (my_scripts / "microflash.py").read_text(encoding="utf-8")
        line = text.split("def tiles")[0].rstrip().count("\n") + 2
        assert f"\nNext: write online_softmax, microflash.py line {line}.\n" in report

    def test_what_else_was_changed_is_named_if_tests_fail_for_it(self, report):
        assert report.count("not counted") == 1
        changes = " ".join(report.split("What else differs in ")[1].split())
        assert changes == "microflash.py from the original: matrix_gap, SRAM."

    def test_refusals_in_other_words_are_right(self, report):
        assert is_done("group_size", report)


PLACES = [*range(30), 7, *range(31, 40)]


@pytest.mark.parametrize("yours, expected, shown", [
    (deque(range(40)), deque(PLACES), "at [30]: 30 / at [30]: 7"),
    (list(range(40)), list(range(41)), "at length: 40 / at length: 41"),
    (Counter("aabccc"), Counter("aabccc" * 2), "Counter({'a': 2, 'b': 1, 'c': 3}) / "
     "Counter({'a': 4, 'b': 2, 'c': 6})"),
    ([OrderedDict.fromkeys(range(40))], [OrderedDict.fromkeys([*range(38), 39, 38])],
     "at [0], key 38: 38 / at [0], key 38: 39"),
    ({i: i for i in range(40)}, {i: min(i, 20) for i in range(40)}, "at [21]: 21 / at [21]: 20"),
    ({i: i for i in range(40)}, {i: i for i in range(41)}, "at length: 40 / at length: 41"),
    (SimpleNamespace(b=deque(range(40))), SimpleNamespace(b=deque(PLACES)),
     "at ['b'][30]: 30 / at ['b'][30]: 7"),
    (1.0000001, 1.0, "1.0000001 / 1.0"),
    (b"\xd0\x03ab", b"\xd0\x83ab",
     'bytes.fromhex("d0 03 61 62") / bytes.fromhex("d0 83 61 62")'),
    (bytes(18), bytes(17) + b"!", "at [17]: 0 / at [17]: 33"),
], ids=["deque", "length", "Counter", "order", "dict", "length of a dict", "attribute",
        "number", "bytes", "many bytes"])
def test_the_place_where_two_values_differ_is_shown(yours, expected, shown):
    lines = difference((yours, (), {}), (expected, (), {}), None, ((), {}), [])
    yours, expected = shown.split(" / ")
    assert lines == [f"  yours     {yours}", f"  expected  {expected}"]


def is_done(name, report):
    """Return whether a report says that all tests of a technique pass, of those that ran."""
    done = rf"^(done  |so far)   {re.escape(name)}: (its test passes|its \d+ tests pass)$"
    return re.search(done, report, re.M) is not None


def test_a_name_that_matches_nothing_is_told_unless_a_script_could_not_be_read(tmp_path):
    lines = []
    reporter = SimpleNamespace(ensure_newline=lambda: None, write_line=lines.append)
    grader = Grader(tmp_path, tmp_path, [], False, False, "nothing")
    grader.n_left_out = 5
    grader.write_what_ran(reporter)
    assert lines[0].startswith("No test matches -k nothing. ")
    grader.problems["microkv"] = "line 1: SyntaxError: invalid syntax"
    grader.write_what_ran(reporter)
    assert len(lines) == 1


def test_scripts_whose_tests_do_not_run_are_left_out(tmp_path):
    titles = []
    reporter = SimpleNamespace(section=titles.append, write_line=lambda line, **style: None)
    grader = Grader(tmp_path, tmp_path, [], False, False)
    grader.scripts = ["microflash", "microkv"]
    grader.problems = {"microflash": "", "microkv": ""}
    grader.scripts_with_tests = {"microflash"}
    grader.pytest_terminal_summary(reporter)
    assert titles == ["microflash: 0 of 0 done"]
    grader.scripts_with_tests = set()
    grader.pytest_terminal_summary(reporter)
    assert len(titles) == 3


def test_the_line_where_a_missing_definition_belongs():
    original = 'X = 1\ndef f():\n    1\n\nclass A:\n    """A."""\n    def g(self):\n        1\n'
    without_g = original[:original.index("    def g")] + "    x = 1\n"
    assert line_for("A.g", without_g, original) == 7
    assert line_for("A.g", "X = 1\ndef f():\n    1\n", original) == 4
    assert line_for("f", "X = 1\n", original) == 1


# ----------------------------------------------------------- the grades of made-up techniques

def made_up(folder, **pairs):
    """Return a grader of made-up techniques, and these, whose calls go through it.

    pairs: {name: (the learner's function, the original's)}.
    """
    grader = Grader(folder, folder, [], False, False)
    called = SimpleNamespace()
    for name, (learners, original) in pairs.items():
        grader.grades["made_up", name] = Grade("made_up", name, "written", 1)
        grader.originals["made_up", name] = original
        setattr(called, name, grader.followed("made_up", name)(learners))
    return grader, called


def times_run(grader, test, **fixtures):
    """Let a grader run a test, and return how many times it ran."""
    n_times = 0

    def counted(**fixtures):
        nonlocal n_times
        n_times += 1
        test(**fixtures)

    item = SimpleNamespace(name="test_it", originalname="test_it", path=Path("test_made_up.py"),
                           obj=counted, funcargs=fixtures,
                           _fixtureinfo=SimpleNamespace(argnames=list(fixtures)))
    with contextlib.suppress(*MISTAKES, pytest.skip.Exception):
        grader.pytest_pyfunc_call(item)
    return n_times


def lines_of(grader, name):
    """Return the lines of a made-up technique's grade, as one text."""
    return "\n".join(grader.grades["made_up", name].lines())


def positive(x):
    if x <= 0:
        raise ValueError("x must be positive")
    return x


@pytest.mark.parametrize("learners, shown", [
    # The test then fails with an error of pytest's that is no Exception.
    (lambda x: x, "positive(0)\n  yours     0\n  expected  ValueError: x must be positive"),
    (lambda x: sys.exit(), "positive(2)\n  yours     SystemExit\n  expected  2"),
], ids=["does not refuse", "ends Python"])
def test_what_does_not_refuse_or_ends_python_is_wrong(learners, shown, tmp_path):
    grader, made = made_up(tmp_path, positive=(learners, positive))

    def refuses():
        with pytest.raises(ValueError):
            made.positive(0)

    times_run(grader, lambda: made.positive(2))
    times_run(grader, refuses)
    failed = "its 2 tests fail" if "Exit" in shown else "1 of its 2 tests fails"
    assert lines_of(grader, "positive") == (
        f"{failed}; the smallest call that shows it:\n{shown}")


def add_to(x):
    x.append(1)


@pytest.mark.parametrize("learners, original, arguments, shown", [
    (lambda x: None, lambda x: [x], [1], "yours     None: is a return missing?\nexpected  [1]"),
    (lambda x: (yield x), lambda x: [x], [1],
     "yours     a generator: it yields, and should return\nexpected  [1]"),
    (lambda x: [0, x / 2], lambda x: [0, x // 2], [2],
     "yours     a float: 1.0\nexpected  an int: 1"),
    (lambda x: [x], lambda x: (x,), [1], "yours     a list: [1]\nexpected  a tuple: (1,)"),
    (lambda x: (x, 2), lambda x: Paper(x, 2), ["A"],
     "yours     a tuple: ('A', 2)\nexpected  a Paper: Paper(text='A', sections=2)"),
    (add_to, lambda x: None, [[]], "yours     changes x to [1]\nexpected  leaves x as it is"),
    (lambda x: None, add_to, [[]], "yours     leaves []\nexpected  leaves [1]"),
], ids=["None", "yields", "float for int", "list for tuple", "tuple for NamedTuple",
        "changes its argument", "does not change its argument"])
def test_another_kind_of_result_is_named(learners, original, arguments, shown, tmp_path):
    grader, made = made_up(tmp_path, make=(learners, original))

    def test():
        given = copy.deepcopy(arguments)
        expected = copy.deepcopy(arguments)
        assert repr(made.make(*given)) == repr(original(*expected))
        assert given == expected

    times_run(grader, test)
    lines = [line.strip() for line in lines_of(grader, "make").splitlines()]
    assert lines[0] == "its test fails; the smallest call that shows it:"
    assert "\n".join(lines[2:]) == shown


def test_a_call_that_fits_is_whole_and_so_are_the_words_of_an_error(tmp_path):
    words = "the rows must all have as many numbers as the first of them has, not one more"

    def refuse(rows, text):
        raise ValueError(words)

    grader, made = made_up(tmp_path, total=(lambda rows, text: 0, refuse))
    arguments = [[[0.25 + i, -1.5] for i in range(12)], "a  text of many words " * 2]

    def test():
        with pytest.raises(ValueError):
            made.total([[1.0] * 40] * 40, "a longer call, which is cut")
        with pytest.raises(ValueError):
            made.total(*arguments)

    times_run(grader, test)
    _, *call, yours, _, _ = lines_of(grader, "total").split("\n")
    assert yours == "  yours     0"
    assert lines_of(grader, "total").endswith(
        "\n  expected  ValueError: the rows must all have as many numbers as the\n"
        "            first of them has, not one more")
    assert eval("\n".join(call), {"total": lambda *given: list(given)}) == arguments


def test_a_call_that_is_whole_is_shown_rather_than_a_smaller_one_that_is_cut(tmp_path):
    grader, made = made_up(tmp_path, total=(lambda rows: 0, sum))
    whole = [0.5] * 70
    cut = [1 / 3] * 69

    def test():
        assert made.total(cut) == sum(cut)

    times_run(grader, test)
    assert "..." in lines_of(grader, "total")
    times_run(grader, lambda: made.total(whole) == 35.0 or pytest.fail())
    assert f"[{', '.join(['0.5'] * 70)}]" in " ".join(lines_of(grader, "total").split())


def test_an_int_for_a_float_is_right_and_so_is_a_list_for_a_generator(tmp_path):
    def one_and_two():
        yield 1.0
        yield 2.0

    grader, made = made_up(tmp_path, numbers=(lambda: [1, 2], one_and_two), wrong=(int, float))

    def test():
        assert sum(made.numbers()) == 3
        assert made.wrong(0.5) == 0.5

    times_run(grader, test)
    assert lines_of(grader, "numbers") == "its test passes"
    assert lines_of(grader, "wrong").startswith("its test fails; ")


def work(seconds):
    """Do something for so many seconds of this process."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


needs_alarm = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no time limits here")


@needs_alarm
@pytest.mark.parametrize("forever", [work, time.sleep], ids=["works", "waits"])
def test_what_never_ends_is_tried_once(forever, tmp_path, monkeypatch):
    for name in ("LONGEST_FIRST", "LONGEST_LATER", "LONGEST"):
        monkeypatch.setattr(grading, name, 0.02)
    grader, made = made_up(tmp_path, endless=(lambda: forever(1000), lambda: 1),
                           double=(lambda x: x + x, lambda x: 2 * x))

    def test():
        assert made.endless() + made.double(1) == 3

    assert times_run(grader, test) > 1
    assert times_run(grader, test) == 1
    never_ends, *others = lines_of(grader, "endless").split("\n")
    assert never_ends.startswith("never ends, or takes more than 0.02 seconds ")
    assert never_ends.endswith("its other tests are skipped")
    assert others == ["endless()"]
    assert lines_of(grader, "double") == "its 2 tests pass"


@needs_alarm
@pytest.mark.parametrize("learners, word", [
    (lambda x: work(0.004) or x, "too slow"), (lambda x: work(0.004) or 0, "wrong")])
def test_what_is_right_but_takes_long_is_too_slow(learners, word, tmp_path, monkeypatch):
    for name in ("LONGEST_FIRST", "LONGEST_LATER", "LONGEST", "LONGEST_REPEATS"):
        monkeypatch.setattr(grading, name, 0.02)
    monkeypatch.setattr(grading, "TIMES_AS_LONG", 2)
    grader, made = made_up(tmp_path, same=(learners, lambda x: x))

    def test():
        assert sum(made.same(x) for x in range(60)) == 59 * 30

    times_run(grader, test)
    assert grader.grades["made_up", "same"].word() == word
    if word == "too slow":
        assert re.fullmatch(r"takes more than 0\.02 seconds and 2 times what the original's "
                            r"takes, but is right in \d calls that could be compared; its other "
                            r"tests are skipped\nin the test test_it", lines_of(grader, "same"))


@needs_alarm
def test_a_time_limit_inside_of_another_leaves_that_as_it_is():
    with pytest.raises(NeverEnds), time_limit(0.02):
        with time_limit(10):
            pass
        time.sleep(10)
    with time_limit(0.02):
        pass
    work(0.04)


@needs_alarm
def test_what_takes_as_long_as_the_original_is_right_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LONGEST_LATER", 0.01)
    names = [f"work_{i}" for i in range(8)]
    grader, made = made_up(tmp_path, **dict.fromkeys(names, (work, work)))
    n_times = times_run(grader, lambda: [getattr(made, name)(0.004) for name in names])
    assert n_times == 3  # too long; with the originals; as often as it takes
    assert all(lines_of(grader, name) == "its test passes" for name in names)


def test_the_wrong_one_of_many_is_found_by_halving(tmp_path):
    """Each is called more often than it is compared, and the last call is wrong."""
    n_calls = grading.MOST_CALLS + 1
    names = [f"f{i}" for i in range(16)]
    pairs = {name: (lambda x: x, lambda x: x) for name in names}
    pairs["f11"] = (lambda x: min(x, n_calls - 2), lambda x: x)
    grader, made = made_up(tmp_path, **pairs)

    def test():
        for name in names:
            assert [getattr(made, name)(x) for x in range(n_calls)] == list(range(n_calls))

    # Together; with the originals; then the suspects, and two parts of them four times.
    assert times_run(grader, test) <= 2 + 1 + 2 * 4
    for name in names:
        verb = "fails" if name == "f11" else "passes"
        assert lines_of(grader, name).startswith(f"its test {verb}")


def test_what_is_wrong_for_long_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LONGEST_BLAMED", 1e-9)
    grader, made = made_up(tmp_path, half=(lambda x: 0, lambda x: x / 2))

    def test():
        assert made.half(3) == 1.5

    assert times_run(grader, test) > 1
    assert times_run(grader, test) == 1
    assert lines_of(grader, "half").startswith("its test fails, 1 more is skipped; ")


def test_what_a_wrong_technique_has_left_in_a_cache_is_forgotten(tmp_path):
    grader, made = made_up(tmp_path, half=(lambda x: 0, lambda x: x / 2))

    class Lab:
        @functools.cached_property
        def half(self):
            return made.half(3)

    def test(lab):
        assert lab.half == 1.5

    times_run(grader, test, lab=Lab())
    assert grader.broken_tests == []
    assert lines_of(grader, "half").startswith("its test fails")


def test_what_is_not_found_out_in_time_counts_neither_way(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LONGEST_SEARCH", -1)
    grader, made = made_up(tmp_path, half=(lambda x: 0, lambda x: x / 2),
                           double=(lambda x: x + x, lambda x: 2 * x))

    def test():
        assert made.double(made.half(3)) == 3

    times_run(grader, test)
    assert lines_of(grader, "half").startswith("its 0 tests pass, 1 more is skipped")


def test_tests_are_left_out_when_the_others_have_taken_long(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "LONGEST_GRADE", 0)
    grader, made = made_up(tmp_path, double=(lambda x: x + x, lambda x: 2 * x))
    assert times_run(grader, lambda: made.double(1)) == 1
    assert times_run(grader, lambda: made.double(1)) == 0
    grader.n_tests = 2
    assert what_ran(grader).startswith(
        "1 of the tests is left out, because the others took more than 0 seconds: 0 of them in "
        "your double. 1 of 2 tests ran: ")


def what_ran(grader):
    """Return what a grader says about the tests that ran."""
    lines = []
    grader.write_what_ran(SimpleNamespace(ensure_newline=lambda: None, write_line=lines.append))
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("n_tests, n_left_out, keyword, beginning", [
    (4, 333, "alibi", "4 of 337 tests match -k alibi: what is right so far may fail in the"),
    (1, 336, "slopes", "1 of 337 tests matches -k slopes: "),
    (0, 337, "nosuch", "No test matches -k nosuch."),
    (3, 334, "", "3 of 337 tests ran: "),
    (337, 0, "a", ""),
])
def test_what_ran_is_said_unless_all_did(n_tests, n_left_out, keyword, beginning, tmp_path):
    grader = Grader(tmp_path, tmp_path, [], False, False, keyword)
    grader.n_tests = n_tests
    grader.n_left_out = n_left_out
    assert what_ran(grader).startswith(beginning)
    assert bool(what_ran(grader)) is bool(beginning)


def test_an_untouched_script_runs_no_tests(tmp_path, monkeypatch):
    original = HINTED.partition("SECTIONS")[0] + "SECTIONS = []\nWIDTH = 80\n"
    for module in (grading, importing):
        monkeypatch.setattr(module, "source_of", lambda script: original)
    monkeypatch.setattr(grading, "problem_of", lambda script, path: None)
    monkeypatch.setitem(sys.modules, "microflash", None)  # afterwards it is what it was
    path = tmp_path / "microflash.py"
    unwritten = taken_out(original, techniques(original))
    for text, is_untouched in ((unwritten, True), (unwritten.replace("80", "79"), None)):
        path.write_text(text, encoding="utf-8")
        grader = Grader(tmp_path, tmp_path, ["microflash"], False, False)
        for script, expected in (("microflash", is_untouched), ("microkv", None)):
            item = SimpleNamespace(path=ROOT / "tests" / f"test_{script}.py")
            assert grader.pytest_runtest_protocol(item) is expected


def test_the_best_tests_of_a_script_run_before_its_others(tmp_path):
    grader, _ = made_up(tmp_path)
    grader.best_tests = {"test_b", "test_d"}
    names = ["test_a", "test_b", "test_c", "test_d"]
    items = [SimpleNamespace(path=path, originalname=name) for path in "yx" for name in names]
    grader.pytest_collection_modifyitems(items)
    assert [item.path + item.originalname[-1] for item in items] == [
        "yb", "yd", "ya", "yc", "xb", "xd", "xa", "xc"]


class Terminal(io.StringIO):
    """A terminal of one line; `line` is what one sees there."""

    line = ""

    def isatty(self):
        return True

    def write(self, text):
        for part in text.split("\r")[1:]:
            self.line = part + self.line[len(part):]


def test_a_terminal_says_how_far_the_grade_is(tmp_path, monkeypatch):
    for stream, shown in ((Terminal(), "grading: 2 of 41 tests"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        grader, _ = made_up(tmp_path)
        grader.n_tests = 41
        grader.status.show("grading: reading microattention.py")
        grader.pytest_runtest_logstart()
        grader.pytest_runtest_logstart()
        seen = stream.line if stream.isatty() else stream.getvalue()
        assert seen.rstrip() == shown
        grader.pytest_sessionfinish(SimpleNamespace(), pytest.ExitCode.OK)
        seen = stream.line if stream.isatty() else stream.getvalue()
        assert seen.strip() == ""


# --------------------------------------------------------------------- how pytest is configured

def test_the_tests_of_scripts_that_are_not_in_the_folder_run_if_they_are_named(tmp_path):
    """They run on the originals then."""
    grader, _ = made_up(tmp_path)
    file = ROOT / "tests" / "test_microflash.py"
    assert grader.pytest_ignore_collect(file) is True
    grader.tests_were_named = True
    assert grader.pytest_ignore_collect(file) is None
    grader.problems["microflash"] = "line 1: SyntaxError: invalid syntax"
    assert grader.pytest_ignore_collect(file) is True


@pytest.mark.parametrize("folder, why", [
    ("none", "none is no folder with one of the scripts in it"),
    (ROOT, "these are the originals"),
])
def test_a_folder_without_scripts_is_refused(folder, why, tmp_path):
    config = SimpleNamespace(option=SimpleNamespace(impl=folder),
                             invocation_params=SimpleNamespace(dir=tmp_path))
    with pytest.raises(pytest.UsageError, match=why) as refusal:
        grading.pytest_configure(config)
    assert str(folder) in str(refusal.value)
    if folder == "none":  # the path that was tried, too
        assert str(tmp_path / folder) in str(refusal.value)


@pytest.mark.parametrize("given, impl, n_workers", [
    (None, None, 2), (4, None, 4), (None, "my", 0), (4, "my", 0),
])
def test_two_workers_share_the_tests_and_one_process_grades(given, impl, n_workers, pytestconfig):
    hooks = pytestconfig.hook.pytest_cmdline_main.get_hookimpls()
    assert any(hook.plugin is grading and hook.wrapper for hook in hooks)  # before xdist's own
    config = SimpleNamespace(
        option=SimpleNamespace(impl=impl, numprocesses=given, usepdb=False),
        pluginmanager=SimpleNamespace(hasplugin=lambda name: name == "xdist"))
    next(grading.pytest_cmdline_main(config))
    assert config.option.numprocesses == n_workers


def test_a_trace_fails_where_the_slopes_of_alibi_are_all_alike(tmp_path):
    text = with_bodies("microattention", {"alibi_slopes": "return [1.0] * n_heads"})
    path = tmp_path / "microattention.py"
    path.write_text(text, encoding="utf-8")
    done = run(sys.executable, path, "--section", "5")
    assert done.returncode == 1
    assert "FAIL" in done.stdout


# -------------------------------------------------------------------------------------- the list

def test_papers_are_read_from_the_docstring():
    text = '''"""T.

The papers
  A et al., Title, With Comma, 2020, arXiv:2001.00001; B, 2021, 2101.00002
    and more     sections 1, 12
  C & D, example.org/page, 2019      section 2
"""
'''
    assert papers(text) == [
        ("A et al. 2020, arXiv:2001.00001", [1, 12]),
        ("B 2021, arXiv:2101.00002", [1, 12]),
        ("C & D 2019, example.org/page", [2]),
    ]


def test_the_list_has_sections_papers_techniques_and_tests():
    done = make("--list", "microattention")
    assert done.returncode == 0
    section = done.stdout.split("\n\n")[5]
    title, *papers_and_techniques = section.splitlines()
    assert title == "5. Positions: RoPE and ALiBi"
    assert "   Press et al. 2021, arXiv:2108.12409" in papers_and_techniques
    slopes = next(line for line in papers_and_techniques if "alibi_slopes" in line)
    assert slopes.split()[0] == "microattention.alibi_slopes"
    assert slopes.split()[1].startswith("test_alibi_slopes")
    everything = make("--list").stdout
    for name in NAMES:
        for technique in techniques(source_of(name)):
            assert f" {name}.{technique.name} " in everything.replace("\n", " ")


@each_name
def test_the_tests_in_the_list_exist_and_are_of_techniques(name):
    """`python3 tests/tools/find_tests.py` makes the list."""
    tests = (ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8")
    listed = listed_tests()
    mine = {key: test for key, test in listed.items() if key.startswith(f"{name}.")}
    assert mine
    for key, test in mine.items():
        assert f"def {test}(" in tests, f"{key}: run python3 tests/tools/find_tests.py {name}"
    names = {f"{name}.{technique.name}" for technique in techniques(source_of(name))}
    assert mine.keys() <= names, f"run python3 tests/tools/find_tests.py {name}"


def test_a_test_in_the_list_fails_if_its_technique_is_broken():
    """Of one script. `python3 tests/tools/find_tests.py --check` tries them all."""
    done = run(sys.executable, FIND_TESTS, "--check", "microattention")
    assert done.returncode == 0, done.stdout


def test_a_technique_is_broken_by_what_it_returns_or_by_doing_nothing():
    numbers = []

    def double(x) -> float:
        return 2 * x

    def keep(x) -> None:
        numbers.append(x)

    # Annotations are text in the scripts.
    keep.__annotations__["return"] = "None"
    finder = find_tests.Finder([])
    finder.broken = "script", "name"
    assert finder.call(("script", "name"), double, (1.0,), {}) == 2.03
    assert finder.call(("script", "other"), double, (1.0,), {}) == 2.0
    finder.call(("script", "name"), keep, (1,), {})
    finder.call(("script", "other"), keep, (2,), {})
    assert numbers == [2]


@pytest.mark.parametrize("value", [
    0, 1.5, True, "text", b"bytes", [], [1, [2]], (0.5, None), {"a": 1}, range(3), {1, 2},
], ids=repr)
def test_a_broken_technique_returns_something_else(value):
    before = repr(value)
    assert find_tests.spoiled(value) != value
    assert repr(value) == before


# ------------------------------------------------------------------------------------ the README

def test_an_excerpt_goes_stale_and_is_refreshed():
    trace = "\n── 1 ── A ──\nalpha\nbeta 2\ngamma\n\n── 2 ── B ──\nbeta 3\n"
    text = "x\n<!-- one section 1, 2 lines from: beta -->\n```text\nbeta 1\n```\ny\n"
    fresh = text.replace("beta 1\n", "beta 2\ngamma\n")
    assert readme.with_excerpts(text, "one", trace) == fresh
    assert readme.with_excerpts(text, "other", trace) == text
    wrong = text.replace("from: beta", "from: delta")
    with pytest.raises(ValueError, match="delta"):
        readme.with_excerpts(wrong, "one", trace)
