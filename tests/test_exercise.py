"""The exercise maker, the grades of `pytest --impl`, and the parts of the README that are made from the scripts."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import readme
from tests.tools.exercise import NAMES, ROOT, taken_out, techniques

each_name = pytest.mark.parametrize("name", NAMES)


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def make(*arguments):
    """The finished process of the exercise maker."""
    return subprocess.run([sys.executable, str(ROOT / "tests" / "tools" / "exercise.py"), *map(str, arguments)],
                          capture_output=True, text=True, encoding="utf-8")


def functions(text):
    """{name or Class.name: code without docstring} of all functions and methods, and the classes' other lines."""
    tree = ast.parse(text)
    pairs = [("", tree)] + [(node.name + ".", node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return {prefix + node.name: "\n".join(map(ast.unparse, node.body[ast.get_docstring(node) is not None:]))
            for prefix, parent in pairs for node in parent.body if isinstance(node, ast.FunctionDef)}


def docstrings(text):
    """Those of the script, its functions, classes and methods."""
    tree = ast.parse(text)
    nodes = [tree, *tree.body, *(method for node in tree.body if isinstance(node, ast.ClassDef) for method in node.body)]
    return [ast.get_docstring(node) for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))]


@each_name
def test_an_exercise_takes_out_the_techniques_and_nothing_else(name):
    original, chosen = source(name), techniques(source(name))
    exercise = taken_out(original, chosen)
    before, after = functions(original), functions(exercise)
    assert before.keys() == after.keys() and docstrings(original) == docstrings(exercise)
    names = {technique.name for technique in chosen}
    for function in before:
        assert after[function] == (f"raise NotImplementedError('{function}')" if function in names else before[function])
    assert len(names) >= 20 and not any(function.startswith("show_") for function in names)
    prose = [line for line in original.splitlines() if line.startswith("#")]
    assert prose == [line for line in exercise.splitlines() if line.startswith("#")]


@each_name
def test_a_half_done_script_prints_its_trace_all_the_same(name, tmp_path, capsys):
    path = tmp_path / f"half_{name}.py"
    path.write_text(taken_out(source(name), techniques(source(name))), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = {"microquant": ["--section", "3,4"], "microbeam": ["--section", "1,2", "--steps", "2"], "microkv": ["--section", "2,3"]}
    assert module.main(chosen.get(name, [])) == 1
    out = capsys.readouterr().out
    heads = len(re.findall(r"^── ", out, re.M))
    assert len(re.findall(r"^Not written yet: \S+\. This section goes on", out, re.M)) == heads > 1
    assert f"\nSections that wait for a function: {heads}.\n" in out and "FAIL" not in out


def test_hints_are_a_first_comment_or_the_calls():
    text = source("microattention")
    hinted = taken_out(text, techniques(text), hints=True)
    for technique in techniques(text):
        where = hinted.index(f'raise NotImplementedError("{technique.name}")')
        line = hinted[:where].rstrip().splitlines()[-1].strip()
        assert line.startswith("# ") or line.endswith('"""')
    assert re.search(r"# calls .*visible_weights.*\n +raise NotImplementedError\(\"attention\"\)", hinted)


def test_one_technique_and_a_learners_file_is_left_alone(tmp_path):
    my = tmp_path / "a" / "my"
    done = make("microflash.flash_attention", my)
    assert done.returncode == 0 and "1 to write: flash_attention." in done.stdout
    written = (my / "microflash.py").read_text(encoding="utf-8")
    assert written.count("raise NotImplementedError(") == 1
    (my / "microflash.py").write_text("mine", encoding="utf-8")
    for what in ("microflash", "microflash.py", "microflash.flash_attention"):
        done = make("--hint", what, my)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and "left alone" in done.stderr
    assert (my / "microflash.py").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("arguments", [[], ["microfish", "my"], ["microflash.nothing", "my"], ["microflash"],
                                       ["microflash.show_standard", "my"], ["microflash", "/dev/null/my"]])
def test_the_exercise_maker_refuses_in_one_line(arguments, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "tools" / "exercise.py"), *arguments], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- the grades

def grade(folder, edits, *arguments, what="microattention"):
    """The report on an exercise after edits {technique: its body}, where a body replaces the NotImplementedError."""
    assert make(what, folder).returncode == 0
    path = folder / f"{what.partition('.')[0]}.py"
    text = path.read_text(encoding="utf-8")
    for technique, body in edits.items():
        stub = f'raise NotImplementedError("{technique}")'
        assert stub in text
        text = text.replace(stub, body)
    path.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", f"--impl={folder}", "-p", "no:cacheprovider", *arguments],
                          capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    return done, done.stdout[done.stdout.index("====="):]


def bodies(name, *wanted):
    """{technique: its body as in the original}."""
    text = source(name)
    found = {t.name: "\n".join(text.splitlines()[t.node.body[1].lineno - 1:t.node.end_lineno]).strip() for t in techniques(text)}
    return {technique: found[technique] for technique in wanted}


def test_grades_tell_done_from_wrong_and_unwritten(tmp_path):
    ways = {"alibi_slopes": "return [2.0 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)]",  # powers of 2 only
            **bodies("microattention", "alibi_bias", "mean_pool_kv_heads")}
    ways["mean_pool_kv_heads"] = "# mine\n    pass\n    " + ways["mean_pool_kv_heads"]
    done, report = grade(tmp_path, ways, "-k", "alibi or bytes or mean_pool")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert re.search(r"^not yet  kv_bytes_per_token: not yet written$", report, re.M)
    assert re.search(r"^done     mean_pool_kv_heads: (\d+) of \1 tests pass$", report, re.M)
    slopes = re.search(r"^wrong    alibi_slopes: .*\n +alibi_slopes\(12\)\n +yours     \[(.*)\]\n +expected  \[(.*)\]$", report, re.M)
    assert slopes[2].startswith("0.5, 0.25, 0.125, ") and slopes[1].startswith("0.62996, 0.39685, ")
    shown = re.search(r"```text\n(wrong .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert shown in report  # what the README says a grade looks like
    assert "alibi_bias" not in report  # is the original's
    assert re.search(r"^\d of 21 done\.$", report, re.M)


def test_a_grade_blames_the_function_inside(tmp_path):
    """The wrong piece is called wrong, and what calls it waits; what waits for an unwritten one says so."""
    wrong = {**bodies("microattention", "split_heads", "attention_weights", "grouped_query_attention"),
             "attention": "return [row[:] for row in v[len(v) - len(q):]]"}
    wrong["grouped_query_attention"] = "# mine\n    pass\n    " + wrong["grouped_query_attention"]
    wrong["multi_head_attention"] = "return grouped_query_attention(x, wq, wk, wv, wo, n_heads, n_heads, **mask)"
    _, report = grade(tmp_path, wrong, "-k", "dense_masked or grouped or multi_head")
    assert "\nnot yet  visible_keys: not yet written\n" in report
    assert re.search(r"^wrong    attention: 0 of \d+ tests pass", report, re.M)
    assert re.search(r"^waits    grouped_query_attention: .* attention must be right first$", report, re.M)


def test_a_method_is_graded_by_what_it_does_to_its_object(tmp_path):
    done, report = grade(tmp_path, {"BlockPool.free": "self.ref_count[block_id] -= 1"}, "-k", "pool or fork",
                         what="microkv.BlockPool.free")
    assert done.returncode == 1 and "microkv: 1 techniques of your own, " in report
    assert re.search(r"^wrong    BlockPool\.free: .* the smallest call that shows it:\n +BlockPool\.free\(.*\n"
                     r" +yours .*\n +expected .*", report, re.M)
    assert report.rstrip().splitlines()[-2] == "0 of 1 done."


def test_an_error_is_blamed_on_the_function_it_left(tmp_path):
    wrong = {**bodies("microattention", "visible_keys", "attention_weights"), "attention": "return nonsense"}
    wrong["grouped_query_attention"] = "# mine\n    pass\n    " + bodies("microattention", "grouped_query_attention")[
        "grouped_query_attention"]
    wrong |= bodies("microattention", "split_heads")
    _, report = grade(tmp_path, wrong, "-k", "dense_masked or grouped")
    assert re.search(r"^wrong    attention: .*", report, re.M) and "NameError" in report
    assert re.search(r"^waits    grouped_query_attention: .* attention must be right first$", report, re.M)


def test_refusals_are_graded_but_not_their_words(tmp_path):
    ways = bodies("microattention", "alibi_slopes")
    ways["alibi_slopes"] = ways["alibi_slopes"].replace("n_heads must be at least 1", "no")
    done, report = grade(tmp_path, ways, "-k", "alibi_slopes", what="microattention.alibi_slopes")
    assert done.returncode == 0 and "\ndone     alibi_slopes: 1 of 1 tests pass\n" in report


def test_what_is_not_in_the_folder_falls_back_and_an_empty_folder_is_refused(tmp_path):
    assert make("microattention.alibi_slopes", tmp_path).returncode == 0
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--impl={tmp_path}", "tests/test_microflash.py", "-k", "online_and_safe"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\b[1-9]\d* passed", done.stdout)
    done = subprocess.run([*command, f"--impl={tmp_path / 'none'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4 and "there is none of the scripts in it" in done.stderr


# ---------------------------------------------------------------------------------------- the README

def test_the_map_is_up_to_date():
    """`python tests/tools/readme.py` makes it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.MAP.search(text) and readme.with_map(text) == text


@each_name
def test_the_map_has_every_function_that_a_section_names_and_tests_that_exist(name):
    row = re.compile(r"^\|[^|]*\| `(\w+)` \| `(\w+)`", re.M)
    part = readme.technique_map().split(f"<b>{name}.py</b>")[1].split("</details>")[0]
    named = [function for _, names in readme.sections(source(name)) for function in names]
    assert [function for function, _ in row.findall(part)] == named
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {test}(" in tests for _, test in row.findall(part))


def test_papers_are_read_from_the_docstring():
    text = '"""T.\n\nThe papers:\n  A et al., Title, With Comma, 2020, arXiv:2001.00001; B, 2021, 2101.00002\n' \
           '    and more     sections 1, 12\n  C & D, example.org/page, 2019      section 2\n"""\n'
    assert readme.papers(text) == {1: ["[A et al. 2020](https://arxiv.org/abs/2001.00001)", "[B 2021](https://arxiv.org/abs/2101.00002)"],
                                   12: ["[A et al. 2020](https://arxiv.org/abs/2001.00001)", "[B 2021](https://arxiv.org/abs/2101.00002)"],
                                   2: ["[C & D 2019](https://example.org/page)"]}


def test_an_excerpt_goes_stale_and_is_refreshed():
    trace = "\n── 1 ── A ──\nalpha\nbeta 2\ngamma\n\n── 2 ── B ──\nbeta 3\n"
    text = "x\n<!-- one section 1, 2 lines from: beta -->\n```text\nbeta 1\n```\ny\n"
    assert readme.with_excerpts(text, "one", trace) == text.replace("beta 1\n", "beta 2\ngamma\n")
    assert readme.with_excerpts(text, "other", trace) == text
    with pytest.raises(ValueError, match="delta"):
        readme.with_excerpts(text.replace("from: beta", "from: delta"), "one", trace)
