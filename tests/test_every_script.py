"""What holds for every script alike: the rules of the collection.

A rule that could stop being tested without anybody noticing is tried on a broken copy of a script
as well, and must be seen to fail there.

A script runs in a process of its own where the process matters: its interpreter, its encoding, a
signal, a pipe, and the whole trace. All else runs inside this process, which is faster.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tests.tools import readme
from tests.tools.exercise import NAMES, ROOT, parsed
from tests.tools.fast_llama import make_fast

SCRIPTS = [ROOT / f"{name}.py" for name in NAMES]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# Some scripts train a model first. They run whole once. What can be seen on any section is tried
# on two cheap ones, with arguments that make them cheaper where that helps.
CHEAP = {
    "microattention": "1,2",
    "microkv": "2,8",
    "microflash": "1,2",
    "microquant": "3,10",
    "microbeam": "1,2",
}
CHEAPER = {"microbeam": ["--steps", "1", "--max-new-tokens", "6"]}
# A change that a check of these sections must notice.
BREAKAGE = {
    "microattention": ("return [e / total for e", "return [e / total + 1e-3 for e"),
    "microkv": ("return 2 * n_layers * n_kv_heads", "return 3 * n_layers * n_kv_heads"),
    "microflash": ("return [e / total for e", "return [e / total + 1e-3 for e"),
    "microquant": ("max(block, key=abs) / -8", "max(block, key=abs) / -9"),
    "microbeam": ("if gone > 1 - p:", "if gone > 2 - p:"),
}


def module_of(script):
    """Return a script as a module of this process."""
    return importlib.import_module(script.stem)


def cheap(script):
    """Return the arguments of a cheap run."""
    return ["--section", CHEAP[script.stem], *CHEAPER.get(script.stem, [])]


def run(script, *arguments, options=(), **settings):
    """Return the finished process of `python [options] script [arguments]`."""
    settings = {"capture_output": True, "timeout": 300, "stdin": subprocess.DEVNULL} | settings
    return subprocess.run([sys.executable, *options, str(script), *arguments], **settings)


WITHOUT_NETWORK = """
import runpy, socket, sys
def refuse(*_, **__):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def whole_trace(script):
    """Return the finished process of a complete run, made once.

    It runs in an empty folder, without a network, with a hash seed of this Python's own. Where the
    environment names a folder KEEP_TRACES, the trace is kept there: .ci/run compares those of all
    Pythons.
    """
    hash_seed = str(sys.version_info.minor)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", WITHOUT_NETWORK, str(script)],
                              capture_output=True, cwd=folder, stdin=subprocess.DEVNULL,
                              env=os.environ | {"PYTHONHASHSEED": hash_seed})
    if "KEEP_TRACES" in os.environ:
        Path(os.environ["KEEP_TRACES"], script.stem).write_bytes(done.stdout)
    return done


class Stream(io.TextIOWrapper):
    """A standard stream for a script inside this process; it may call itself a terminal."""

    def __init__(self, text="", encoding="utf-8", is_terminal=False):
        super().__init__(io.BytesIO(text.encode()), encoding=encoding, newline="\n")
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal

    def written(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


class Printed(NamedTuple):
    """What a run inside this process returned, and what it printed."""

    status: int
    out: str
    errors: str


def run_here(script, *arguments, encoding="utf-8", to_terminal=False, typed=None):
    """Return what script prints inside this process.

    to_terminal: whether its output is a terminal. typed: what a reader at a terminal types.
    """
    out = Stream(encoding=encoding, is_terminal=to_terminal)
    errors = Stream()
    keyboard = Stream(typed or "", is_terminal=typed is not None)
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors),
          mock.patch("sys.stdin", keyboard)):
        try:
            status = module_of(script).main([*arguments])
        except SystemExit as end:
            status = end.code
    return Printed(status, out.written(), errors.written())


@functools.cache
def cheap_here(script, *arguments):
    """Return what the cheap sections print inside this process, made once."""
    return run_here(script, *cheap(script), *arguments)


# Where all sections run, with many knobs, models, texts and samples are smaller, because what every
# check holds for is any model and any number of texts. Whole traces have them in full size.
SMALL_MODEL = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 8}


def small_lab_config():
    """Return the sizes of a model for microquant with a quarter of the weights."""
    module = module_of(ROOT / "microquant.py")
    return module.Config(len(module.word_tokenizer().vocab), dim=32, n_layers=1, n_heads=2,
                         n_kv_heads=1, hidden_dim=32)


measure_load = module_of(ROOT / "microkv.py").measure_load


def measure_small_load(way, rates, n_requests, seed):
    """Return what microkv's measure_load() does, of a quarter of the requests."""
    return measure_load(way, rates, n_requests // 4, seed)


SMALLER = {
    "microkv": {"SIZES": SMALL_MODEL, "measure_load": measure_small_load},
    "microquant": {
        "lab_config": small_lab_config,
        "TRAINING": (8, 40, 0.02),
        "TERNARY_TRAINING": (2, 24, 0.005),
        "EVALUATION_VERSES": 2,
        "AWQ_TOKENS": 12,
    },
    "microbeam": {
        "TARGET": SMALL_MODEL,
        "DRAFT": {"dim": 4, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 4},
        "FILTER_PLACES": 8,
        "EXACT_PASSES": 20,
        "PAY_TEXTS": 2,
        "COMPARED_TEXTS": 2,
        "COMPARED_TOKENS": 6,
    },
}


@pytest.fixture
def run_small(monkeypatch):
    """Make the scripts inside this process small, and train their models for few steps.

    microquant multiplies by numpy. (The checks of microkv count the products that it makes itself,
    and microbeam's models here are so small that numpy saves nothing.)
    """
    for script in SCRIPTS:
        module = module_of(script)
        small = SMALLER.get(script.stem, {}) | little_training(module)
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
        if script.stem == "microquant":
            make_fast(monkeypatch, module)


@functools.cache
def little_training(module):
    """Return {name: function} of what is replaced in a script so that it trains little, and once.
    """
    if hasattr(module, "build_lab"):  # with a cache of its own, apart from the full-size labs
        return {"build_lab": functools.cache(module.build_lab.__wrapped__)}
    if hasattr(module, "train"):
        return {"train": remembered(module.train)}
    return {}


def remembered(train):
    """Return train(), for at most four steps, that looks up what it was asked before."""
    models = {}

    def look_up(config, ids, rng, steps, *arguments, **settings):
        key = repr((config, tuple(ids), rng.getstate(), steps, arguments, settings))
        if key not in models:
            models[key] = train(config, ids, rng, min(steps, 4), *arguments, **settings)
        return models[key]

    return look_up


def broken_copy(script, folder, old, new):
    """Return the path of a copy of script in which one text, which must be there, is replaced."""
    text = script.read_text(encoding="utf-8")
    assert old in text
    copy = folder / script.name
    copy.write_text(text.replace(old, new), encoding="utf-8")
    return copy


# The source


def tree_of(script):
    """Return the syntax tree of a script; the same text is parsed once."""
    return parsed(script.read_text(encoding="utf-8"))


def imported_modules(script):
    """Return the top-level names of all modules that a script imports, wherever it does."""
    names = set()
    for node in ast.walk(tree_of(script)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@each_script
def test_imports_the_standard_library_only(script):
    assert imported_modules(script) <= sys.stdlib_module_names


@pytest.mark.parametrize("foreign", ["import numpy", "from microkv import ceil_div"])
def test_a_foreign_import_is_seen(foreign, tmp_path):
    broken = broken_copy(SCRIPTS[0], tmp_path, "import math\n", f"import math\n{foreign}\n")
    assert not imported_modules(broken) <= sys.stdlib_module_names


def definitions(script):
    """Return {name: source} of a script's top-level functions, classes and constants.

    The knobs, the table of sections and main are the script's own and are left out. Knobs are the
    constants before the first definition.
    """
    lines = script.read_text(encoding="utf-8").splitlines()
    found = {}
    defined_something = False
    for node in tree_of(script).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined_something = True
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id]
        else:
            continue
        if not defined_something and names[0] not in ("Vector", "Matrix", "Weights"):
            continue
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        start = min([node.lineno, *decorators])
        for name in names:
            found[name] = "\n".join(lines[start - 1:node.end_lineno])
    for own in ("main", "SECTIONS", "make_parser", "check_knobs"):
        found.pop(own, None)
    return found


def conflicts(scripts):
    """Return the names that two scripts define differently."""
    sources = {}
    for script in scripts:
        for name, source in definitions(script).items():
            sources.setdefault(name, set()).add(source)
    return sorted(name for name, different in sources.items() if len(different) > 1)


def test_one_name_one_definition(tmp_path):
    assert conflicts(SCRIPTS) == []
    copy = broken_copy(SCRIPTS[0], tmp_path, "total = sum(exps)", "total = sum(list(exps))")
    assert conflicts([SCRIPTS[0], copy]) == ["softmax"]
    copy = broken_copy(SCRIPTS[0], tmp_path, "WIDTH = 80", "WIDTH = 81")
    assert conflicts([SCRIPTS[0], copy]) == ["WIDTH"]


FLOORS = ["THE TECHNIQUES", "THE EXPERIMENTS", "THE MODEL AND THE BENCH", "SHARED BY THE FIVE"]


def floors_of(source):
    """Return [(name, text)] of the entrance, the four floors, and what follows them."""
    rule = "# " + "=" * 93 + "\n"
    parts = re.split(rf"^{rule}# ([A-Z ]+)(?::.*)?\n(?:# .*\n)*{rule}", source, flags=re.M)
    return [("ENTRANCE", parts[0]), *zip(parts[1::2], parts[2::2])]


@each_script
def test_the_floors_stand_in_their_order(script):
    floors = floors_of(script.read_text(encoding="utf-8"))
    assert [name for name, _ in floors] == ["ENTRANCE", *FLOORS]


@each_script
def test_the_techniques_print_nothing_and_know_no_knobs(script):
    techniques = dict(floors_of(script.read_text(encoding="utf-8")))["THE TECHNIQUES"]
    names = {node.id for node in ast.walk(parsed(techniques)) if isinstance(node, ast.Name)}
    assert names & {"trace", "Trace", "knobs", "print", "Namespace"} == set()
    assert "def show_" not in techniques


@each_script
def test_both_upper_floors_have_the_sections_of_the_table(script):
    floors = dict(floors_of(script.read_text(encoding="utf-8")))
    titles = [(str(i), section.title) for i, section in enumerate(sections_of(script), 1)]
    for floor in ("THE TECHNIQUES", "THE EXPERIMENTS"):
        assert re.findall(r"^# (\d+)\. (.+)$", floors[floor], re.M) == titles


@each_script
def test_a_section_names_the_function_that_measures_it(script):
    techniques = dict(floors_of(script.read_text(encoding="utf-8")))["THE TECHNIQUES"]
    ideas = re.split(r"^# \d+\. ", techniques, flags=re.M)[1:]
    for idea, section in zip(ideas, sections_of(script), strict=True):
        assert f"Measured by {section.show.__name__}()." in idea


def sections_of(script):
    """Return the table of a script's sections."""
    return module_of(script).SECTIONS


@each_script
def test_everything_public_has_a_docstring(script):
    for node in tree_of(script).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def refuses(function):
    """Return whether a function raises, or calls a check that raises."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("check_"):
            return True
    return False


@each_script
def test_a_technique_that_refuses_says_so(script):
    """A learner who writes it from its docstring must know."""
    source = script.read_text(encoding="utf-8")
    last_line = source[:source.index("\n# THE EXPERIMENTS")].count("\n")
    for node in tree_of(script).body:
        if node.lineno > last_line or not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        for function in ast.walk(node):
            if isinstance(function, ast.FunctionDef) and refuses(function):
                words = f"{ast.get_docstring(node)} {ast.get_docstring(function)}"
                assert "Error" in words, function.name


@each_script
def test_importing_prints_nothing_and_leaves_the_global_generator_alone(script, tmp_path):
    code = ("import random, sys; state = random.getstate(); sys.path.insert(0, sys.argv[1]); "
            f"__import__({script.stem!r}); sys.exit(random.getstate() != state)")
    done = subprocess.run([sys.executable, "-I", "-W", "error", "-c", code, str(ROOT)],
                          capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@each_script
def test_an_old_python_gets_one_line(script):
    """The source is one that old Pythons can read as far as the line that tells them."""
    ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 8))
    definitions = (ast.FunctionDef, ast.ClassDef)
    beginning = itertools.takewhile(lambda node: not isinstance(node, definitions),
                                    tree_of(script).body)
    code = compile(ast.Module([*beginning], []), str(script), "exec", dont_inherit=True)
    with (mock.patch("sys.version_info", (3, 10, 9, "final", 0)),
          pytest.raises(SystemExit) as stop):
        exec(code, {"__name__": "__main__"})
    assert stop.value.code == "This script needs Python 3.11 or newer."


# The trace


@each_script
def test_the_whole_trace_ends_well(script):
    done = whole_trace(script)
    text = done.stdout.decode("utf-8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "FAIL" not in text
    assert "\x1b" not in text
    held = int(re.search(r"^All (\d+) checks held\.", text, re.M)[1])
    listed = len(re.findall(r"^ok    (?!\d+ self-tests? )", text, re.M))
    unlisted = sum(map(int, re.findall(r"^ok    (\d+) self-tests? ", text, re.M)))
    assert held == listed + unlisted
    assert re.search(rf"^Try next: python3 {script.stem}\.py .+\n\Z", text, re.M)
    assert max(map(len, text.splitlines())) <= 80
    assert [line for line in text.splitlines() if line != line.rstrip()] == []


@each_script
def test_the_readme_shows_this_trace(script):
    """`python3 tests/tools/readme.py` refreshes it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- {script.stem} section" in text
    trace = whole_trace(script).stdout.decode("utf-8")
    assert readme.with_excerpts(text, script.stem, trace) == text


@each_script
def test_every_section_checks_something_and_names_functions_that_exist(script):
    text = whole_trace(script).stdout.decode("utf-8")
    module = module_of(script)
    heads = re.findall(r"^── (\d+) ── (.+?) ─+\nin the source: ((?:.+\n)(?: {15}.+\n)*)", text,
                       re.M)
    assert [int(number) for number, _, _ in heads] == list(range(1, len(module.SECTIONS) + 1))
    for (_, title, names), section in zip(heads, module.SECTIONS):
        assert title == section.title
        expected = [technique.__name__ for technique in section.techniques]
        assert [name.strip() for name in names.split(",")] == expected
        for technique in section.techniques:
            assert getattr(module, technique.__name__) is technique
    for section in re.split(r"^── \d+ ── ", text, flags=re.M)[1:]:
        assert "\nok    " in section


@each_script
def test_a_failed_check_is_told_and_makes_the_status_1(script, tmp_path):
    """Under -O too: checks are not assertions."""
    broken = broken_copy(script, tmp_path, *BREAKAGE[script.stem])
    done = run(broken, *cheap(script), options=["-O"])
    assert done.returncode == 1
    assert b"\nFAIL  " in done.stdout
    assert re.search(rb"^\d+ of \d+ checks FAILED\.$", done.stdout, re.M)


@each_script
def test_the_same_bytes_whatever_the_interpreter_options(script, tmp_path):
    done = run(script, *cheap(script), options=["-I", "-OO", "-W", "error", "-X", "utf8=0"],
               cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("utf-8") == cheap_here(script).out


@each_script
def test_ascii_is_ascii(script):
    """Every character that the whole trace uses has its stand-in; .ci/run sees to the width."""
    out = cheap_here(script, "--ascii").out
    assert out.isascii()
    assert max(map(len, out.splitlines())) <= 80
    used = {c for c in whole_trace(script).stdout.decode("utf-8") if not c.isascii()}
    assert used <= set(map(chr, module_of(script).ASCII))


@pytest.mark.parametrize("script, encoding", [
    *((script, "ascii") for script in SCRIPTS), (SCRIPTS[0], "cp1252")],
    ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_falls_back_to_ascii_where_the_output_cannot_show_more(script, encoding):
    shown = run_here(script, *cheap(script), encoding=encoding)
    assert shown == cheap_here(script, "--ascii")
    assert shown.status == 0


def test_falls_back_to_ascii_in_a_process_of_its_own():
    script = SCRIPTS[0]
    done = run(script, *cheap(script), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.decode("ascii") == cheap_here(script, "--ascii").out


@each_script
def test_colour_on_terminals_only(script, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = run_here(script, *cheap(script), to_terminal=True).out
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == cheap_here(script).out


@pytest.mark.parametrize("settings", [{"TERM": "dumb"}, {}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_no_colour_where_the_environment_wants_none(settings, monkeypatch):
    """On one script: printing is a shared definition."""
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    shown = run_here(SCRIPTS[0], *cheap(SCRIPTS[0]), to_terminal=True)
    assert shown == cheap_here(SCRIPTS[0])


def test_colour_on_a_real_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pytest.importorskip("pty").openpty()
    command = [sys.executable, str(SCRIPTS[0]), *cheap(SCRIPTS[0])]
    process = subprocess.Popen(command, stdout=theirs)
    os.close(theirs)
    output = b""
    while chunk := read_terminal(ours):
        output += chunk
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in output


def read_terminal(descriptor):
    """Return what comes from a terminal, and nothing once its last writer is gone."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


@each_script
def test_time_goes_to_stderr(script):
    timed = run_here(script, *cheap(script), "--time")
    assert timed.out == cheap_here(script).out
    assert re.fullmatch(r"(section \d+: \d+\.\d\d s\n){2}", timed.errors)


# Predictions


def shown_by(module, show):
    """Return the source of a show function and of the show functions that it calls."""
    source = inspect.getsource(show)
    inner = set(re.findall(r"\b(show_\w+)\(", source)) - {show.__name__}
    return source + "".join(shown_by(module, getattr(module, name)) for name in sorted(inner)
                            if name not in ("show_token",))


@each_script
def test_every_section_has_a_question(script):
    module = module_of(script)
    for section in module.SECTIONS:
        assert "trace.ask(" in shown_by(module, section.show), section.title


@each_script
def test_predict_asks_shows_the_answer_and_keeps_the_score(script):
    silent = cheap_here(script, "--predict")  # nobody is there to answer
    assert (silent.status, silent.errors) == (0, "")
    answers = re.findall(r"^  computed: (.+)$", silent.out, re.M)
    assert len(answers) == silent.out.count("\nPredict: ") >= 2
    assert "Predictions:" not in silent.out
    rest = re.sub(r"\nPredict: (?:.+\n)+?  computed: .+\n", "", silent.out)
    assert rest == cheap_here(script).out

    # An answer, and Enter to go on after the verdict.
    typed = "".join(answer + "\n\n" for answer in answers)
    shown = run_here(script, "--predict", *cheap(script), typed=typed)
    assert (shown.status, shown.errors) == (0, "")
    assert f"\nPredictions: {len(answers)} of {len(answers)} right.\n" in shown.out
    assert shown.out.count("(Enter: go on)") == len(answers)


def test_wrong_answers_and_no_more_answers():
    """On one script: asking is a shared definition."""
    script = SCRIPTS[0]
    n = cheap_here(script, "--predict").out.count("\n  computed: ")
    wrong = run_here(script, "--predict", *cheap(script), typed="1e99\n\n" * n)
    assert wrong.status == 0
    assert f"\nPredictions: 0 of {n} right.\n" in wrong.out
    assert wrong.out.count(": not quite") == n
    pass_and_end = run_here(script, "--predict", *cheap(script), typed="\n\n")
    assert pass_and_end.status == 0
    assert "Predictions:" not in pass_and_end.out


def test_predict_listens_to_a_real_terminal():
    """The answers are typed ahead. Ctrl-D says that no more will come."""
    ours, theirs = pytest.importorskip("pty").openpty()
    os.write(ours, b"1e99\n\n\x04")
    command = [sys.executable, str(SCRIPTS[0]), "--predict", *cheap(SCRIPTS[0])]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    os.close(theirs)
    out, errors = process.communicate(timeout=100)
    os.close(ours)
    assert (process.returncode, errors) == (0, b"")
    assert out.count(b"(Enter: pass)") == 2
    assert b"\nPredictions: 0 of 1 right.\n" in out


def test_control_c_at_a_question():
    """On one script: asking is a shared definition."""
    script = SCRIPTS[0]
    ours, theirs = pytest.importorskip("pty").openpty()
    command = [sys.executable, "-u", str(script), "--predict", *cheap(script)]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=allow_interrupts)
    os.close(theirs)
    output = b""
    while b"(Enter: pass)" not in output:
        chunk = os.read(process.stdout.fileno(), 4096)
        assert chunk
        output += chunk
    # The prompt is out a moment before Python listens: an interrupt may come too soon.
    for _ in range(200):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    _, errors = process.communicate(timeout=20)
    os.close(ours)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def allow_interrupts():
    """Let Ctrl-C through, even if these tests run under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# The command line


@each_script
def test_list_and_section(script):
    expected = []
    for number, section in enumerate(sections_of(script), 1):
        star = "*" if section.core else " "
        expected.append(f"{number:>2}{star} {section.title}")
    listed = run_here(script, "--list").out.splitlines()
    assert listed[:len(expected)] == expected
    assert listed[-1].startswith("* the core")

    first, second = CHEAP[script.stem].split(",")
    extra = CHEAPER.get(script.stem, [])
    chosen = run_here(script, "--section", f"{second},{first}", "--section", second, *extra)
    assert chosen == cheap_here(script)
    assert re.search(r"\nAll \d+ checks held.*\nTry next: .*\n\Z", chosen.out)
    if not extra:
        whole = whole_trace(script).stdout.decode("utf-8")
        parts = re.split(r"(?=^── \d+ ── )", whole, flags=re.M)
        assert chosen.out.startswith(parts[0] + parts[int(first)] + parts[int(second)])


@each_script
def test_help_names_every_option(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run_here(script, "--help")
    assert (shown.status, shown.errors) == (0, "")
    for option in ("--list", "--section", "--seed", "--ascii", "--time", "--predict",
                   "--self-tests"):
        assert option in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


REFUSED_EVERYWHERE = [
    "--section 0", "--section 99", "--section 1,x", "--section ,", "--section 1.5", "--seed x",
    "--seed -1", "--seed 1e3", "--nonsense", "--nonsense\x1b[31m", "positional", "--section",
    "--asci", "--seed 99999999999999999999"]
REFUSED = {
    "microattention": [
        "--n-heads 3", "--n-heads 0", "--dim 30", "--dim 4", "--dim x", "--n-kv-heads 3",
        "--window 0", "--window -1", "--sinks -1", "--ranks 3", "--ranks 0", "--stages 0",
        "--stages 9", "--micro-batches 0", "--micro-batches 17", "--text=", "--text=  ",
        "--text " + "ab cd " * 200],
    "microkv": [
        "--prompt=", "--prompt The queen", "--prompt " + "This is the " * 30, "--max-new-tokens 0",
        "--max-new-tokens x", "--max-new-tokens 65", "--block-size 0", "--block-size -4",
        "--num-blocks 0", "--num-blocks 3", "--num-blocks 1000", "--max-num-seqs 0",
        "--max-num-batched-tokens 0", "--block-size 2 --num-blocks 5"],
    "microflash": [
        "--seq-len 0", "--seq-len 257", "--seq-len x", "--head-dim 0", "--head-dim 129",
        "--seq-len 256 --head-dim 9", "--seq-len 65 --block-q 1 --block-k 1",
        "--seq-len 256 --head-dim 8 --block-q 5 --block-k 3", "--block-q 0", "--block-k 0",
        "--block-k -4", "--sram 0", "--sram 1311", "--sram 100 --block-q 1", "--n-splits 0",
        "--n-splits 1025", "--causal yes", "--text=", "--text=  ", "--text " + "ab cd " * 200],
    "microquant": [
        "--bits 1", "--bits 9", "--bits x", "--bits 4.5", "--group-size 3", "--group-size 65",
        "--group-size -1", "--calibration-tokens 0", "--calibration-tokens 257", "--alpha 1.1",
        "--alpha -0.1", "--alpha nan", "--alpha x", "--outliers 3", "--outliers 9,32",
        "--outliers 3,0.5", "--outliers 3,65", "--outliers a,b", "--outliers -1,2",
        "--gguf-type Q5_0", "--gguf=/nonexistent/folder/tiny.gguf", "--gguf="],
    "microbeam": [
        "--prompt=", "--prompt This is the queen", "--prompt Ünï", "--prompt " + "the " * 65,
        "--max-new-tokens 0", "--max-new-tokens 65", "--temperature 0", "--temperature -1",
        "--temperature nan", "--temperature x", "--temperature inf", "--top-k 0", "--top-p 0",
        "--top-p 1.5", "--top-p nan", "--min-p -0.1", "--min-p 1.1", "--width 0", "--width 17",
        "--length-penalty -3", "--length-penalty x", "--gamma 0", "--gamma 17", "--steps 0",
        "--steps 101"],
}


@each_script
def test_a_bad_command_line_is_refused_in_one_line(script, capfd):
    for arguments in REFUSED_EVERYWHERE + REFUSED[script.stem]:
        with pytest.raises(SystemExit) as stop:
            module_of(script).main(split_arguments(arguments))
            pytest.fail(f"{arguments!r} is not refused")
        out, err = capfd.readouterr()
        assert stop.value.code == 2, arguments
        assert out == "", arguments
        assert err.endswith("\n"), arguments
        assert err.count("\n") == 1, arguments
        assert err.startswith(script.stem + ": "), arguments
        assert err.strip().isprintable(), arguments


def split_arguments(line):
    """Return the arguments of a command line; what follows --text or --prompt is one of them."""
    if line.startswith(("--text ", "--prompt ")):
        return line.split(" ", 1)
    if line.startswith(("--text=", "--prompt=")) and " --" not in line:
        return [line]
    return line.split(" ")


# Knobs at their edges: every check must hold all the same. Only those sections run that read one of
# the knobs in the line. A line has several knobs where no section reads more than one of them, or
# where the edges of all together are the harder case.
EDGES = {
    "microattention": [
        "--n-heads 1 --section 3,6,8", "--n-heads 8 --dim 64 --section 6,8",
        "--dim 8 --n-heads 8 --n-kv-heads 8 --section 3,6,8",
        "--dim 20 --n-heads 5 --section 3,6,8", "--dim 48 --n-heads 6 --section 3",
        "--n-heads 2 --section 3", "--window 1 --sinks 0 --section 4",
        "--window 9999 --sinks 9999 --section 4", "--window 2 --sinks 4 --section 4",
        "--n-heads 32 --n-kv-heads 8 --ranks 16 --section 3,8", "--ranks 4 --section 8",
        "--n-kv-heads 1 --section 3,8",
        "--dim 48 --n-heads 12 --n-kv-heads 3 --ranks 6 --section 3,8",
        "--stages 1 --micro-batches 1 --section 8", "--stages 8 --micro-batches 16 --section 8",
        "--text=x --section 1,2,3,4", "--text=a\tb\nc --section 1,2,4",
        "--text=Ünïcödé—日本語🙂 --section 1,2,4", "--text=16,16 --section 1,2",
        "--seed 1000000000", "--text=\udcffbroken --section 1,2,4"],
    "microkv": [
        "--block-size 1 --section 3,4,5,8", "--block-size 64 --section 3,4,5,8",
        "--block-size 33 --section 3,8", "--block-size 7 --max-num-seqs 1 --section 5,6,9",
        "--block-size 5 --num-blocks 5 --section 9",
        "--num-blocks 999 --max-num-seqs 64 --section 6,9",
        "--max-num-batched-tokens 1 --section 7", "--max-num-batched-tokens 37 --section 7",
        "--max-num-batched-tokens 9999 --section 7",
        "--prompt=built --max-new-tokens 1 --section 1,3", "--max-new-tokens 64 --section 1",
        "--seed 1000000000 --section 1,3,6,9,11"],
    "microflash": [
        "--seq-len 1 --section 1,3,4,6,7,8",
        "--seq-len 1 --head-dim 1 --block-q 1 --block-k 1 --sram 11 --section 1,3,4,6,7,8",
        "--seq-len 13 --block-q 5 --block-k 7 --section 1,3,4,6,7,8",
        "--seq-len 67 --causal --section 1,3,4,6", "--head-dim 1 --n-splits 7 --section 3,6,7",
        "--head-dim 128 --seq-len 17 --section 3,4,6", "--head-dim 64 --section 3",
        "--seq-len 256 --head-dim 8 --block-q 64 --block-k 64 --section 3",
        "--seq-len 256 --head-dim 1 --block-q 64 --block-k 64 --section 4,6,8",
        "--seq-len 100 --head-dim 3 --block-q 4 --section 4,6,8",
        "--seq-len 31 --block-q 1 --block-k 1 --section 3,4,6,8",
        "--block-q 1000000 --block-k 1000000 --n-splits 1 --section 3,4,6,7,8",
        "--block-k 1 --causal --section 3,6,7", "--block-q 3 --block-k 64 --section 3,4,8",
        "--sram 1312 --section 3,6",
        "--n-splits 1024 --seq-len 20 --sram 1000000000 --section 3,7", "--seed 1000000000",
        "--text=x --section 2", "--text=a\tb\nc --section 2",
        "--text=Ünïcödé—日本語🙂 --section 2",
        "--text=" + "the\nrat\n" * 60 + " --section 2", "--text=\udcffbroken --section 2"],
    "microquant": [
        "--bits 2 --group-size 4 --section 2,6,13", "--bits 2 --group-size 7 --section 1,7,17",
        "--bits 8 --group-size 64 --section 2,7,9,13",
        "--calibration-tokens 1 --section 6,7,13,17",
        "--calibration-tokens 256 --alpha 1 --outliers 0,1 --section 1,2,5",
        "--alpha 0 --outliers 8,64 --section 1,2,5", "--seed 1000000000 --section 3,4,15,16"],
    "microbeam": [
        "--steps 2 --max-new-tokens 1 --section 1,4,5,7,8,9,10",
        "--steps 1 --gamma 16 --max-new-tokens 9 --width 16 --length-penalty 4 --section 4,5,6,7",
        "--steps 2 --gamma 1 --max-new-tokens 2 --width 1 --length-penalty -2 --section 4,5,6,7,8",
        "--steps 2 --temperature 0.05 --top-p 1 --min-p 1 --top-k 999 --section 2,3,5",
        "--steps 2 --temperature 10 --top-p 1e-9 --min-p 0 --top-k 1 --section 2,3,5",
        "--prompt=T --steps 2 --max-new-tokens 30 --section 1,2,4,5,11",
        "--prompt=\n --steps 2 --max-new-tokens 9 --section 1,2,3,4,5,8,11",
        "--seed 1000000000 --steps 1 --max-new-tokens 9"],
}


@pytest.mark.parametrize("script, arguments", [
    (script, arguments) for script in SCRIPTS for arguments in EDGES[script.stem]],
    ids=lambda value: value.stem if isinstance(value, Path) else ascii(value)[1:30])
def test_every_check_holds_with_a_knob_at_its_edge(script, arguments, run_small, capsys):
    assert module_of(script).main(split_arguments(arguments)) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_gguf_file_holds_with_the_highest_seed():
    """In full size: a check of section 10 works out by hand where a matrix begins in the file."""
    shown = run_here(ROOT / "microquant.py", "--seed", "1000000000", "--section", "10")
    assert shown.status == 0


@each_script
def test_main_ends_in_run_sections(script):
    """That is a shared definition. What follows is tried where it can differ, or on one script."""
    main = next(node for node in tree_of(script).body if getattr(node, "name", "") == "main")
    assert ast.unparse(main.body[-1]).startswith("return run_sections(SECTIONS, knobs, ")


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen([sys.executable, "-u", str(SCRIPTS[0]), *cheap(SCRIPTS[0])],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_a_full_disk_is_told_in_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = run(SCRIPTS[0], *cheap(SCRIPTS[0]), capture_output=False, stdout=full,
                   stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"cannot write")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("script", [SCRIPTS[0], SCRIPTS[-1]], ids=lambda path: path.stem)
def test_control_c_ends_with_130_and_no_traceback(script):
    """The second one trains a model then."""
    process = subprocess.Popen([sys.executable, "-u", str(script)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=allow_interrupts)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors


# The shared definitions


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def module(request):
    return module_of(request.param)


def printed_table(module, capsys, rows, columns):
    """Return the lines of a table."""
    module.Trace().table(rows, columns)
    return capsys.readouterr().out.splitlines()


def test_a_table_formats_and_aligns_by_column(module, capsys):
    rows = [{"name": "a", "n_tokens": 5, "share": 0.25, "times": 3.0},
            {"name": "bcd", "n_tokens": 12345, "share": 1.0, "times": None}]
    columns = {"name": "", "n_tokens": ",d", "share as part of all": ".0%", "times": "{:.1f}×"}
    assert printed_table(module, capsys, rows, columns) == [
        "name  n tokens  part of all  times",
        "a            5          25%   3.0×",
        "bcd     12,345         100%"]


def test_a_table_draws_bars(module, capsys):
    rows = [{"x": 1, "y": 0.5}, {"x": 4, "y": 0.001}, {"x": 0, "y": 0.0}]
    assert printed_table(module, capsys, rows, {"x": "d bar 8", "y": "bar 4 of 1"}) == [
        "x            y",
        "1  ██        ██",
        "4  ████████  ·",
        "0"]


def test_a_table_without_rows_has_its_heading(module, capsys):
    assert printed_table(module, capsys, [], {"a": "", "b_c": "d"}) == ["a  b c"]


@pytest.mark.parametrize("got, holds", [
    ([[1.0, 2.0], [3.0]], True), ([[1.0, 2.0], [3.0 + 5e-7]], True),
    ([[1.0, 2.0], [3.0 + 2e-6]], False), ([[1.0, 2.0], [float("nan")]], False),
    ([[1.0, 2.0]], False), ([[1.0, 2.0], [3.0, 4.0]], False)])
def test_check_close_compares_shapes_and_every_number(module, got, holds, capsys):
    trace = module.Trace()
    trace.check_close("the same", got, [[1.0, 2.0], [3.0]], 1e-6)
    assert (trace.held, trace.failed) == (holds, not holds)
    mark = "ok    " if holds else "FAIL  "
    assert capsys.readouterr().out.startswith(f"\n{mark}the same (max |")


def test_self_tests_are_counted_and_listed_only_if_they_fail(module, capsys):
    trace = module.Trace()
    trace.check("shown", True, "1")
    trace.self_tests()
    trace.check("held", True, "2")
    trace.check("broken", False, "3")
    trace.check("held", True, "4")
    trace.end_section()
    assert capsys.readouterr().out == ("\nok    shown (1)\nFAIL  broken (3)\n"
                                       "ok    2 self-tests of these functions (--self-tests lists "
                                       "them)\n")
    assert (trace.held, trace.failed) == (3, 1)
    trace.check("of the next section", True, "5")
    trace.end_section()
    assert capsys.readouterr().out == "ok    of the next section (5)\n"


def test_self_tests_are_listed_if_the_reader_wants_them(module, capsys):
    trace = module.Trace(self_tests=True)
    trace.self_tests()
    trace.check("held", True, "2")
    trace.end_section()
    assert capsys.readouterr().out == "\nok    held (2)\n"


@each_script
def test_with_self_tests_the_trace_is_the_same_but_for_them(script):
    listed = cheap_here(script, "--self-tests").out
    counted = cheap_here(script).out
    assert re.search(r"\d+ self-tests? of these", listed) is None
    rest = re.sub(r"^ok    \d+ self-tests? of these functions .*\n", "", counted, flags=re.M)
    rest = re.sub(r" \(Self-tests: \d+\.\)$", "", rest, flags=re.M)
    lines = iter(listed.splitlines())
    assert all(line in lines for line in rest.splitlines())  # all, and in this order


def test_what_is_read_as_a_number(module):
    for reply, number in {"33": 33, "33%": 0.33, "1,234": 1234, "5.3×": 5.3, "1/3": 1 / 3, "-2": -2,
                          "1/0": None, "": None, "many": None}.items():
        assert module.read_number(reply) == number, reply


def answer_to(module, monkeypatch, *replies):
    """Return the trace after these replies to a question whose answer is 33."""
    typed = iter([*replies, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    trace = module.Trace(predict=True)
    trace.listening = True
    trace.ask("how many?", 33)
    assert next(typed, None) is None
    return trace


@pytest.mark.parametrize("reply, verdict", [
    ("33", "yes"), ("36.2", "yes"), ("29.8", "yes"), ("37", "not quite"), ("-33", "not quite"),
    ("nan", "not quite")])
def test_a_prediction_is_right_within_a_tenth(module, reply, verdict, capsys, monkeypatch):
    trace = answer_to(module, monkeypatch, reply)
    assert capsys.readouterr().out.endswith(f"  computed: 33: {verdict}\n")
    assert (trace.asked, trace.right) == (1, verdict == "yes")


def test_what_is_no_number_is_asked_again(module, monkeypatch):
    trace = answer_to(module, monkeypatch, "no idea", "many", "33")
    assert (trace.asked, trace.right) == (1, 1)
    trace = answer_to(module, monkeypatch, "no idea", "")
    assert trace.asked == 0


def test_what_a_terminal_would_obey_is_escaped(module):
    assert module.printable("a\x1b[31m\tb ü") == "a\\x1b[31m\\tb ü"


def test_tokenizer_round_trip_and_alphabet(module):
    tokenizer = module.Tokenizer.train(module.TEXT, 96)
    assert len(tokenizer.vocab) == len(set(tokenizer.vocab)) == 96
    assert tokenizer.vocab[:len(set(module.TEXT))] == sorted(set(module.TEXT))
    for text in (module.TEXT, "", " ", "\n\n", "This is the", "  two  blanks ", "a.b.", "horn"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="'q'"):
        tokenizer.encode("This is the queen")


def naive_bpe(text, vocab_size):
    """Return vocabulary, merges and tokens of text, counting all pairs anew after every merge."""
    words = [list(word) for word in re.findall(r" ?\w+| ?[^\w\s]+|\s", text)]
    vocab = sorted(set(text))
    merges = []
    while len(vocab) < vocab_size:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = sorted(counts, key=lambda pair: (-counts[pair], pair))[0]
        merges.append(best)
        if best[0] + best[1] not in vocab:
            vocab.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [word[i] + word[i + 1]]
                i += 1
    return vocab, merges, [part for word in words for part in word]


@pytest.mark.parametrize("text, size", [
    (None, 96), (None, 999), ("aaaa aaa aa", 9), ("abcabc abc bcabca", 12), ("x", 5)])
def test_tokenizer_learns_what_byte_pair_encoding_says(module, text, size):
    text = module.TEXT if text is None else text
    vocab, merges, parts = naive_bpe(text, size)
    tokenizer = module.Tokenizer.train(text, size)
    assert (tokenizer.vocab, tokenizer.merges) == (vocab, merges)
    assert [tokenizer.vocab[i] for i in tokenizer.encode(text)] == parts
    assert all(" " not in token[1:] for token in tokenizer.vocab)


def test_tokenizer_stops_at_its_size_and_says_what_it_knows(module):
    assert module.Tokenizer.train("abc", 3).merges == []
    with pytest.raises(ValueError, match="knows 'abc'"):
        module.Tokenizer.train("abcabc", 9).encode("abd")


@pytest.mark.parametrize("text, size", [("", 10), ("abc", 2), ("abc", 0)])
def test_tokenizer_refuses_what_cannot_work(module, text, size):
    with pytest.raises(ValueError):
        module.Tokenizer.train(text, size)


def test_text_is_the_whole_rhyme(module):
    verses = module.TEXT.splitlines()
    assert len(verses) == 12
    assert verses[0] == "This is the house that Jack built."
    third = "This is the rat that ate the malt that lay in the house that Jack built."
    assert verses[2] == third
    for shorter, longer in zip(verses, verses[1:]):
        assert longer.endswith(shorter.removeprefix("This is"))


def test_softmax(module):
    assert module.softmax([]) == []
    assert module.softmax([1e4, -1e4, 1e4]) == [0.5, 0.0, 0.5]
    assert module.softmax([-float("inf"), 3.0]) == [0.0, 1.0]
    assert module.softmax([-float("inf")] * 2) == [0.0, 0.0]
    e = 2.718281828459045
    assert module.softmax([0.0, 1.0]) == pytest.approx([1 / (1 + e), e / (1 + e)], abs=1e-15)


def test_dot_takes_what_python_3_11_takes(module):
    cases = [([], [], 0), ([2.0], (3.0,), 6.0), ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], 32.0)]
    for a, b, expected in cases:
        assert module.dot(a, b) == module.dot_by_hand(a, b) == expected


def test_ceil_div(module):
    if not hasattr(module, "ceil_div"):
        pytest.skip("not used there")
    assert [module.ceil_div(a, 4) for a in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
