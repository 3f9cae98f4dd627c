"""The exercise maker, the grades of `pytest --impl`, and the parts of the README that are made."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

from tests.tools import readme
from tests.tools.exercise import (
    NAMES,
    ROOT,
    floors,
    sections,
    source_of,
    taken_out,
    techniques,
)

EXERCISE = ROOT / "tests" / "tools" / "exercise.py"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Sections that are quick to print in a script that trains a model first.
QUICK_SECTIONS = {
    "microkv": ["--section", "2,3"],
    "microquant": ["--section", "3,4"],
    "microbeam": ["--section", "1,2", "--steps", "2"],
}

each_name = pytest.mark.parametrize("name", NAMES)


def run(*command, cwd=ROOT):
    """Return the finished process of a command."""
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd)


def make(*arguments, cwd=ROOT):
    """Return the finished process of the exercise maker."""
    return run(sys.executable, EXERCISE, *arguments, cwd=cwd)


def functions_and_methods(text):
    """Return {name or Class.name: node} of all functions and methods of a script."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = method
    return found


def code(node):
    """Return the body of a function as text, without its docstring and comments."""
    statements = node.body
    if ast.get_docstring(node) is not None:
        statements = statements[1:]
    return "\n".join(ast.unparse(statement) for statement in statements)


def docstrings(text):
    """Return the docstrings of a script, and of its classes, functions and methods."""
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    documented = [tree, *classes, *functions_and_methods(text).values()]
    return [ast.get_docstring(node) for node in documented]


def comments(text):
    """Return the lines that are comments at the left margin."""
    return [line for line in text.splitlines() if line.startswith("#")]


# ------------------------------------------------------------------- what stands where in a script

OLD_LAYOUT = '''
# ------------------
# 1. Adding
def add(a, b):
    return a + b
def helper():
    pass
# ------------------
# Helpers
def multiply(a, b):
    return a * b
SECTIONS = [("Adding", show_add, [add, multiply])]
'''

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


def test_sections_are_read_from_tuples_and_from_calls():
    assert sections(OLD_LAYOUT) == [("Adding", ["add", "multiply"])]
    assert sections(FLOORS) == [("Adding", ["add"]), ("Counting", ["Counter"])]


def test_floors_reach_from_heading_to_heading():
    lines = FLOORS.splitlines()
    found = floors(FLOORS)
    assert list(found) == ["THE TECHNIQUES", "THE EXPERIMENTS", "THE MODEL AND THE BENCH"]
    assert [lines[span.start - 1] for span in found.values()] == [
        "# THE TECHNIQUES: one or two", "# THE EXPERIMENTS", "# THE MODEL AND THE BENCH"]
    assert found["THE TECHNIQUES"].stop == found["THE EXPERIMENTS"].start
    assert floors(OLD_LAYOUT) == {}


def test_techniques_without_floors_are_what_sections_name_in_numbered_sections():
    found = [(technique.name, technique.section) for technique in techniques(OLD_LAYOUT)]
    assert found == [("add", 1)]


def test_techniques_with_floors_are_what_the_first_floor_has_for_the_learner():
    found = [(technique.name, technique.section) for technique in techniques(FLOORS)]
    assert found == [("add", 1), ("Counter.count", 2)]


@each_name
def test_what_the_sections_name_on_the_first_floor_is_an_exercise(name):
    source = source_of(name)
    first_floor = floors(source).get("THE TECHNIQUES", range(0))
    exercises = {technique.name for technique in techniques(source)}
    named = {function for _, functions in sections(source) for function in functions}
    for function, node in functions_and_methods(source).items():
        if function in named and node.lineno in first_floor:
            assert function in exercises


# ----------------------------------------------------------------------------- the exercise maker

@each_name
def test_an_exercise_takes_out_the_techniques_and_nothing_else(name):
    original = source_of(name)
    chosen = techniques(original)
    names = {technique.name for technique in chosen}
    exercise = taken_out(original, chosen)

    before = functions_and_methods(original)
    after = functions_and_methods(exercise)
    assert before.keys() == after.keys()
    for function in before:
        if function in names:
            assert code(after[function]) == f"raise NotImplementedError('{function}')"
        else:
            assert code(after[function]) == code(before[function])
    assert docstrings(exercise) == docstrings(original)
    assert comments(exercise) == comments(original)

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

    assert module.main(QUICK_SECTIONS.get(name, [])) == 1
    out = capsys.readouterr().out
    n_sections = len(re.findall(r"^── ", out, re.M))
    waiting = re.findall(r"^Not written yet: \S+\. This section goes on", out, re.M)
    assert n_sections > 1
    assert len(waiting) == n_sections
    assert f"\nSections that wait for a function: {n_sections}.\n" in out
    assert "FAIL" not in out


def test_hints_are_a_first_comment_or_the_calls():
    text = source_of("microattention")
    hinted = taken_out(text, techniques(text), hints=True)
    for technique in techniques(text):
        end = hinted.index(f'raise NotImplementedError("{technique.name}")')
        line_above = hinted[:end].rstrip().splitlines()[-1].strip()
        assert line_above.startswith("# ") or line_above.endswith('"""')
    calls = r"# calls .*visible_weights.*\n +raise NotImplementedError\(\"attention\"\)"
    assert re.search(calls, hinted)


def test_one_technique_is_taken_out(tmp_path):
    folder = tmp_path / "a" / "my"
    done = make("microflash.flash_attention", folder)
    assert done.returncode == 0
    assert "1 to write: flash_attention." in done.stdout
    written = (folder / "microflash.py").read_text(encoding="utf-8")
    assert written.count("raise NotImplementedError(") == 1


@pytest.mark.parametrize("what", ["microflash", "microflash.py", "microflash.flash_attention"])
def test_a_learners_file_is_left_alone(what, tmp_path):
    learners = tmp_path / "microflash.py"
    learners.write_text("mine", encoding="utf-8")
    done = make("--hint", what, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "left alone" in done.stderr
    assert learners.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("arguments", [
    [],
    ["microfish", "my"],
    ["microflash.nothing", "my"],
    ["microflash"],
    ["microflash.show_standard", "my"],
    ["microflash", "/dev/null/my"],
])
def test_the_exercise_maker_refuses_in_one_line(arguments, tmp_path):
    done = make(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ the grades

def grade(folder, edits, *arguments, script="microattention"):
    """Grade a script in which some bodies are replaced. Return the process and its report.

    edits: {technique: its new body, or None if it is not written yet}.
    """
    original = source_of(script)
    chosen = [technique for technique in techniques(original) if technique.name in edits]
    assert len(chosen) == len(edits)
    text = taken_out(original, chosen)
    for technique, body in edits.items():
        if body is not None:
            text = text.replace(f'raise NotImplementedError("{technique}")', body)
    (folder / f"{script}.py").write_text(text, encoding="utf-8")
    done = run(*PYTEST, f"--impl={folder}", *arguments)
    report = done.stdout[done.stdout.index("====="):]
    return done, report


def body(script, wanted):
    """Return the body of a technique as the original has it."""
    text = source_of(script)
    for technique in techniques(text):
        if technique.name == wanted:
            first = technique.node.body[1].lineno  # after the docstring
            lines = text.splitlines()[first - 1:technique.node.end_lineno]
            return "\n".join(lines).strip()
    raise ValueError(f"{script} has no technique {wanted}")


def own_body(script, wanted):
    """Return a body that does what the original does, with other code."""
    return "pass\n    " + body(script, wanted)


def test_grades_tell_done_from_wrong_and_unwritten(tmp_path):
    edits = {
        # Right for powers of two only.
        "alibi_slopes": "return [2.0 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)]",
        "alibi_bias": body("microattention", "alibi_bias"),
        "mean_pool_kv_heads": own_body("microattention", "mean_pool_kv_heads"),
        "kv_bytes_per_token": None,
    }
    done, report = grade(tmp_path, edits, "-k", "alibi or bytes or mean_pool")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "\nnot yet  kv_bytes_per_token: not yet written\n" in report
    assert re.search(r"^done     mean_pool_kv_heads: (\d+) of \1 tests pass$", report, re.M)
    slopes = re.search(r"^wrong    alibi_slopes: .*\n +alibi_slopes\(12\)\n"
                       r" +yours     \[(.*)\]\n +expected  \[(.*)\]$", report, re.M)
    assert slopes[1].startswith("0.62996, 0.39685, ")
    assert slopes[2].startswith("0.5, 0.25, 0.125, ")
    # alibi_bias has the original's code, so that it is not in the report.
    assert "alibi_bias" not in report
    assert "\n1 of 3 done.\n" in report
    # The README shows this grade.
    shown = re.search(r"```text\n(wrong .*?)```", README, re.S)[1]
    assert shown in report


def test_a_grade_blames_the_function_inside(tmp_path):
    edits = {
        "visible_keys": None,
        "grouped_query_attention": own_body("microattention", "grouped_query_attention"),
        "multi_head_attention":
            "return grouped_query_attention(x, wq, wk, wv, wo, n_heads, n_heads, **mask)",
        "attention": "return [row[:] for row in v[len(v) - len(q):]]",
    }
    _, report = grade(tmp_path, edits, "-k", "dense_masked or grouped or multi_head")
    assert "\nnot yet  visible_keys: not yet written\n" in report
    assert re.search(r"^wrong    attention: \d+ of \d+ tests pass", report, re.M)
    waits = r"^waits    grouped_query_attention: .* attention must be right first$"
    assert re.search(waits, report, re.M)


def test_an_error_is_blamed_on_the_function_that_it_left(tmp_path):
    edits = {
        "grouped_query_attention": own_body("microattention", "grouped_query_attention"),
        "attention": "return nonsense",
    }
    _, report = grade(tmp_path, edits, "-k", "dense_masked or grouped")
    assert re.search(r"^wrong    attention: ", report, re.M)
    assert "NameError" in report
    waits = r"^waits    grouped_query_attention: .* attention must be right first$"
    assert re.search(waits, report, re.M)


def test_a_method_is_graded_by_what_it_does_to_its_object(tmp_path):
    edits = {"BlockPool.free": "self.ref_count[block_id] -= 1"}
    done, report = grade(tmp_path, edits, "-k", "pool or fork", script="microkv")
    assert done.returncode == 1
    assert "microkv: 1 techniques of your own, " in report
    assert re.search(r"^wrong    BlockPool\.free: .* the smallest call that shows it:\n"
                     r" +BlockPool\.free\(.*\n +yours .*\n +expected .*", report, re.M)
    assert report.rstrip().splitlines()[-2] == "0 of 1 done."


def test_refusals_are_graded_but_not_their_words(tmp_path):
    original = body("microattention", "alibi_slopes")
    changed = original.replace("n_heads must be at least 1", "no")
    assert changed != original
    done, report = grade(tmp_path, {"alibi_slopes": changed}, "-k", "alibi_slopes")
    assert done.returncode == 0
    assert "\ndone     alibi_slopes: 1 of 1 tests pass\n" in report


def test_impl_takes_a_relative_folder(tmp_path):
    """The folder is relative to the one that pytest is started in."""
    relative = tmp_path.relative_to(ROOT.anchor)
    up = "/".join([".."] * (len(ROOT.parts) - 1))
    assert make("microattention.alibi_slopes", tmp_path).returncode == 0
    done = run(*PYTEST, f"--impl={up}/{relative}", "-k", "alibi_slopes")
    assert "not yet  alibi_slopes: not yet written" in done.stdout


def test_scripts_that_are_not_in_the_folder_are_the_originals(tmp_path):
    assert make("microattention.alibi_slopes", tmp_path).returncode == 0
    done = run(*PYTEST, f"--impl={tmp_path}", "tests/test_microflash.py", "-k", "online_and_safe")
    assert done.returncode == 0
    assert re.search(r"\b[1-9]\d* passed", done.stdout)


def test_a_folder_without_scripts_is_refused(tmp_path):
    done = run(*PYTEST, f"--impl={tmp_path / 'none'}")
    assert done.returncode == 4
    assert "there is none of the scripts in it" in done.stderr


def test_two_workers_share_the_tests():
    pytest.importorskip("xdist")
    done = run(*PYTEST, "-v", "tests/test_exercise.py", "-k", "papers")
    assert done.returncode == 0
    assert "2 workers [1 item]" in done.stdout


# ------------------------------------------------------------------------------------ the README

def test_the_map_is_up_to_date():
    """`python tests/tools/readme.py` makes it."""
    assert readme.MAP.search(README)
    assert readme.with_map(README) == README


@each_name
def test_the_map_has_every_function_that_a_section_names_and_tests_that_exist(name):
    rows = re.findall(r"^\|[^|]*\| `(\w+)` \| `(\w+)`", readme.table_of(name), re.M)
    named = [function for _, functions in sections(source_of(name)) for function in functions]
    assert [function for function, _ in rows] == named
    files = [ROOT / "tests" / f"test_{name}.py", ROOT / "tests" / "test_every_script.py"]
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    for _, test in rows:
        assert f"def {test}(" in tests


def test_papers_are_read_from_the_docstring():
    text = '''"""T.

The papers:
  A et al., Title, With Comma, 2020, arXiv:2001.00001; B, 2021, 2101.00002
    and more     sections 1, 12
  C & D, example.org/page, 2019      section 2
"""
'''
    a = "[A et al. 2020](https://arxiv.org/abs/2001.00001)"
    b = "[B 2021](https://arxiv.org/abs/2101.00002)"
    c = "[C & D 2019](https://example.org/page)"
    assert readme.papers(text) == {1: [a, b], 12: [a, b], 2: [c]}


def test_an_excerpt_goes_stale_and_is_refreshed():
    trace = "\n── 1 ── A ──\nalpha\nbeta 2\ngamma\n\n── 2 ── B ──\nbeta 3\n"
    text = "x\n<!-- one section 1, 2 lines from: beta -->\n```text\nbeta 1\n```\ny\n"
    fresh = text.replace("beta 1\n", "beta 2\ngamma\n")
    assert readme.with_excerpts(text, "one", trace) == fresh
    assert readme.with_excerpts(text, "other", trace) == text
    wrong = text.replace("from: beta", "from: delta")
    with pytest.raises(ValueError, match="delta"):
        readme.with_excerpts(wrong, "one", trace)
