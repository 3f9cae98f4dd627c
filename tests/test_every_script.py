"""What holds for every script alike (the rules of the collection), for each of the scripts that exist.

Where a rule could silently stop being tested, a broken copy of a script is made in the test's own folder and
the rule is seen to fail on it.
"""

import ast
import functools
import inspect
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.tools import readme

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["microattention", "microkv", "microflash", "microquant", "microbeam"]
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES if (ROOT / f"{name}.py").exists()]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)

# Some scripts train a model first. They run whole once; what can be seen on any section is seen on two cheap
# ones, where needed with arguments that make them so. The breakage is one that a check of these must notice.
CHEAP = {"microattention": "1,2", "microkv": "2,3", "microflash": "1,2", "microquant": "3,4", "microbeam": "1,2"}
CHEAPER = {"microbeam": ["--steps", "2", "--max-new-tokens", "6"]}
BREAKAGE = {"microattention": ("return [e / total for e in exps]", "return [e / total + 1e-3 for e in exps]"),
            "microkv": ("return 2 * n_layers * n_kv_heads", "return 3 * n_layers * n_kv_heads"),
            "microflash": ("return [e / total for e in exps]", "return [e / total + 1e-3 for e in exps]"),
            "microquant": ("return [value / above[0] for", "return [value / above[1] for"),
            "microbeam": ("if gone > 1 - p:", "if gone > 2 - p:")}


def cheap(script):
    """The arguments of a cheap run."""
    return ["--section", CHEAP[script.stem], *CHEAPER.get(script.stem, [])]


def run(script, *arguments, options=(), **settings):
    """The finished process of `python [options] script [arguments]`."""
    settings = {"capture_output": True, "timeout": 300, "stdin": subprocess.DEVNULL} | settings
    return subprocess.run([sys.executable, *options, str(script), *arguments], **settings)


@functools.cache
def whole_trace(script):
    """Its complete run, made once: in another folder, without a network, with a hash seed of its own.

    (.ci/run compares it, whole, on every Python found, each time with another hash seed.)
    """
    code = ("import runpy, socket, sys\ndef none(*_, **__): raise OSError('no network')\n"
            "socket.socket.connect = socket.getaddrinfo = none\nsys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, cwd=folder,
                              stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONHASHSEED": "11"})


@functools.cache
def cheap_trace(script, *arguments):
    """The run of its cheap sections, made once."""
    return run(script, *cheap(script), *arguments)


@pytest.fixture(autouse=True)
def train_little(monkeypatch):
    """Where a script runs inside this process, it trains the same model only once, and for a few steps: what every
    check holds for is any model."""
    for script in SCRIPTS:
        module = __import__(script.stem)
        if hasattr(module, "train"):
            monkeypatch.setattr(module, "train", TRAINED.setdefault(module, remembered(module.train)))


TRAINED = {}


def remembered(train):
    """train(), for at most four steps, which looks up what it was asked before."""
    models = {}

    def look_up(config, ids, rng, steps, *arguments, **settings):
        key = repr((config, tuple(ids), rng.getstate(), steps, arguments, settings))
        if key not in models:
            models[key] = train(config, ids, rng, min(steps, 4), *arguments, **settings)
        return models[key]
    return look_up


def broken_copy(script, folder, old, new):
    """A copy of script with one text replaced, which must be there."""
    text = script.read_text(encoding="utf-8")
    assert old in text
    copy = folder / script.name
    copy.write_text(text.replace(old, new), encoding="utf-8")
    return copy


# ------------------------------------------------------------------------------------- the source

def imported_modules(script):
    """The top-level names of all modules that a script imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    return ({alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)})


@each_script
def test_imports_the_standard_library_only(script, tmp_path):
    assert imported_modules(script) <= sys.stdlib_module_names
    for foreign in ("numpy", "microkv"):
        broken = broken_copy(script, tmp_path, "import math\n", f"import math\nimport {foreign}\n")
        assert not imported_modules(broken) <= sys.stdlib_module_names


def definitions(script):
    """{name: source} of a script's top-level functions, classes and constants; the knobs, the table of sections
    and main are the script's own. Knobs are the constants before the first definition."""
    text = script.read_text(encoding="utf-8")
    found, knobs = {}, True
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            knobs, names = False, [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id]
        else:
            continue
        if not knobs or names[0] in ("Vector", "Matrix"):
            start = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
            found |= {name: "\n".join(text.splitlines()[start - 1:node.end_lineno]) for name in names}
    return {name: source for name, source in found.items() if name not in ("main", "SECTIONS")}


def conflicts(scripts):
    """The names that two scripts define differently."""
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


@each_script
def test_everything_public_has_a_docstring(script):
    nodes = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0]
    assert [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)] == []


@each_script
def test_importing_prints_nothing_and_leaves_the_global_generator_alone(script, tmp_path):
    code = ("import random, sys; state = random.getstate(); sys.path.insert(0, sys.argv[1]); "
            f"__import__({script.stem!r}); sys.exit(random.getstate() != state)")
    done = subprocess.run([sys.executable, "-I", "-W", "error", "-c", code, str(ROOT)], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -------------------------------------------------------------------------------------- the trace

@each_script
def test_the_whole_trace_ends_well(script):
    done = whole_trace(script)
    text = done.stdout.decode("utf-8")
    assert done.returncode == 0 and done.stderr == b""
    assert "FAIL" not in text and "\x1b" not in text
    held = int(re.search(r"^All (\d+) checks held\.$", text, re.M)[1])
    assert held == len(re.findall(r"^ok    ", text, re.M)) > 0
    assert re.search(rf"^Try next: python {script.stem}\.py .+\n\Z", text, re.M)
    assert max(map(len, text.splitlines())) <= 80
    assert [line for line in text.splitlines() if line != line.rstrip()] == []


@each_script
def test_the_readme_shows_this_trace(script):
    """`python tests/tools/readme.py` refreshes it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- {script.stem} section" in text
    assert readme.with_excerpts(text, script.stem, whole_trace(script).stdout.decode("utf-8")) == text


def test_microquants_methods_do_what_they_are_for():
    """By the figures of its table, as its trace prints them."""
    text = whole_trace(ROOT / "microquant.py").stdout.decode("utf-8")
    table = text[text.index("── 13 ──"):]
    fp32 = float(re.search(r"^ +FP32 +32\.00 +[\d,]+ +([\d.]+) ", table, re.M)[1])
    rows = re.findall(r"^[a-v][* ] +(.+?) +[\d.]+ +([\d,]+) +([\d.]+) +([\d.]+) +\d+ ", table, re.M)
    size, perplexity, kl = ({name: float(row[i].replace(",", "")) for name, *row in rows} for i in range(3))
    assert len(rows) == 22 and abs(perplexity["INT8 channel"] / fp32 - 1) < 0.005
    assert kl["INT4 tensor"] > 4 * kl["INT4 g32"] and perplexity["INT4 tensor"] > 1.1 * perplexity["INT4 g32"]
    for better in ("GPTQ", "GPTQ, act-order", "AWQ"):
        assert size[better] == size["INT4 g32"] and perplexity[better] < perplexity["INT4 g32"]
        assert kl[better] < 0.75 * kl["INT4 g32"]
    assert max(kl["LLM.int8()"], kl["SmoothQuant"]) < kl["W8A8 static"] / 50
    assert kl["b1.58 trained"] < kl["b1.58, untrained"] / 2
    assert perplexity["NF4 + QLoRA"] < perplexity["NF4, double quant."]


@each_script
def test_every_section_checks_something_and_names_functions_that_exist(script):
    text = whole_trace(script).stdout.decode("utf-8")
    module = __import__(script.stem)
    heads = re.findall(r"^── (\d+) ── (.+?) ─+\nin the source: ((?:.+\n)(?: {15}.+\n)*)", text, re.M)
    assert [int(number) for number, _, _ in heads] == list(range(1, len(module.SECTIONS) + 1))
    for (_, title, names), (expected, _, functions) in zip(heads, module.SECTIONS):
        assert title == expected
        assert [name.strip() for name in names.split(",")] == [function.__name__ for function in functions]
        assert all(getattr(module, function.__name__) is function for function in functions)
    for section in re.split(r"^── \d+ ── ", text, flags=re.M)[1:]:
        assert "\nok    " in section


@each_script
def test_a_failed_check_is_told_and_makes_the_status_1(script, tmp_path):
    """Under -O too: checks are no assertions."""
    broken = broken_copy(script, tmp_path, *BREAKAGE[script.stem])
    done = run(broken, *cheap(script), options=["-O"])
    assert done.returncode == 1 and b"\nFAIL  " in done.stdout
    assert re.search(rb"^\d+ of \d+ checks FAILED\.$", done.stdout, re.M)


@each_script
def test_the_same_bytes_whatever_the_interpreter_options(script, tmp_path):
    done = run(script, *cheap(script), options=["-I", "-OO", "-W", "error", "-X", "utf8=0"], cwd=tmp_path,
               env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == cheap_trace(script).stdout


@functools.cache
def other_pythons():
    """Paths of the Pythons from 3.11 up on this machine whose minor version is not the one running."""
    found = {sys.version_info[:2]: None}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python3.{minor}") for minor in range(11, 16)]
    for path in filter(None, [*candidates, *map(str, sorted(root.glob("versions/3.*/bin/python")))]):
        out = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
        version = tuple(map(int, out.stdout.split()))
        if len(version) == 2 and version >= (3, 11):
            found.setdefault(version, path)
    return [path for path in found.values() if path]


@each_script
def test_the_same_bytes_on_every_python_found(script):
    """Here on cheap sections; .ci/run compares the whole traces."""
    if not (pythons := other_pythons()):
        pytest.skip("no other Python from 3.11 up on this machine")
    for python in pythons:
        done = subprocess.run([python, str(script), *cheap(script)], capture_output=True)
        assert (done.returncode, done.stdout) == (0, cheap_trace(script).stdout), python


@pytest.mark.parametrize("script, encoding", [*((script, "ascii") for script in SCRIPTS), (SCRIPTS[0], "cp1252")],
                         ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_falls_back_to_ascii_where_the_output_cannot_show_more(script, encoding):
    done = run(script, *cheap(script), env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stdout == cheap_trace(script, "--ascii").stdout


@each_script
def test_ascii_is_ascii(script):
    """And every character that the whole trace uses has its stand-in; .ci/run sees to the width."""
    out = cheap_trace(script, "--ascii").stdout
    assert out.isascii() and max(map(len, out.splitlines())) <= 80
    characters = {c for c in whole_trace(script).stdout.decode("utf-8") if not c.isascii()}
    assert characters <= set(map(chr, __import__(script.stem).ASCII))


@pytest.mark.parametrize("script, settings, coloured", [
    *((script, {"TERM": "xterm"}, True) for script in SCRIPTS), (SCRIPTS[0], {"TERM": "dumb"}, False),
    (SCRIPTS[0], {"TERM": "xterm", "NO_COLOR": "1"}, False)])
def test_colour_on_terminals_only(script, settings, coloured):
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | settings
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(script), *cheap(script)], stdout=theirs, env=environment)
    os.close(theirs)
    output = b""
    while chunk := read_terminal(ours):
        output += chunk
    os.close(ours)
    assert process.wait() == 0
    assert (b"\x1b[" in output) == coloured


def read_terminal(descriptor):
    """What a terminal has to say; nothing once its last writer is gone."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


@each_script
def test_time_goes_to_stderr(script):
    timed = cheap_trace(script, "--time")
    assert timed.stdout == cheap_trace(script).stdout
    assert re.fullmatch(rb"(section \d+: \d+\.\d\d s\n){2}", timed.stderr)


# ------------------------------------------------------------------------------------ predictions

def converse(script, typed):
    """The finished process of a cheap run with --predict, and what it printed, after typing all that at a terminal."""
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    process = subprocess.Popen([sys.executable, str(script), "--predict", *cheap(script)], stdin=theirs,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(theirs)
    out, errors = process.communicate(timeout=100)
    os.close(ours)
    assert errors == b""
    return process.returncode, out.decode("utf-8")


@each_script
def test_every_section_has_a_question(script):
    module = __import__(script.stem)
    assert [title for title, show, _ in module.SECTIONS if "trace.ask(" not in inspect.getsource(show)] == []


@each_script
def test_predict_asks_shows_the_answer_and_keeps_the_score(script):
    silent = cheap_trace(script, "--predict")  # no terminal: it asks, and waits for nothing
    assert (silent.returncode, silent.stderr) == (0, b"")
    text = silent.stdout.decode("utf-8")
    answers = re.findall(r"^  computed: (.+)$", text, re.M)
    assert len(answers) == text.count("\nPredict: ") >= 2 and "Predictions:" not in text
    rest = re.sub(r"\nPredict: (?:.+\n)+?  computed: .+\n", "", text)
    assert rest == cheap_trace(script).stdout.decode("utf-8")

    status, out = converse(script, "".join(answer + "\n" for answer in answers))
    assert status == 0 and f"\nPredictions: {len(answers)} of {len(answers)} right.\n" in out


def test_wrong_answers_and_no_more_answers():
    """On one script: asking is a shared definition."""
    script = SCRIPTS[0]
    n = cheap_trace(script, "--predict").stdout.count(b"\n  computed: ")
    status, out = converse(script, "no idea\n" * n)
    assert status == 0 and f"\nPredictions: 0 of {n} right.\n" in out and out.count(" - not quite") == n
    status, out = converse(script, "\n\x04")  # a pass, then no more answers
    assert status == 0 and "Predictions:" not in out


@each_script
def test_control_c_at_a_question(script):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-u", str(script), "--predict", *cheap(script)], stdin=theirs,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    os.close(theirs)
    output = b""
    while b"your answer" not in output:
        assert (chunk := os.read(process.stdout.fileno(), 4096))
        output += chunk
    for _ in range(40):  # the prompt is out a moment before Python listens: an interrupt may come too soon
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            pass
    _, errors = process.communicate(timeout=20)
    os.close(ours)
    assert process.returncode == 130 and b"Traceback" not in errors


# ------------------------------------------------------------------------------- the command line

@each_script
def test_list_and_section(script):
    titles = [title for title, *_ in __import__(script.stem).SECTIONS]
    listed = run(script, "--list").stdout.decode("utf-8").splitlines()
    assert listed == [f"{number:>2}  {title}" for number, title in enumerate(titles, 1)]
    first, second = CHEAP[script.stem].split(",")
    extra = CHEAPER.get(script.stem, [])
    chosen = run(script, "--section", f"{second},{first}", "--section", second, *extra).stdout.decode("utf-8")
    assert chosen == cheap_trace(script).stdout.decode("utf-8")
    if not extra:
        parts = re.split(r"(?=^── \d+ ── )", whole_trace(script).stdout.decode("utf-8"), flags=re.M)
        assert chosen.startswith(parts[0] + parts[int(first)] + parts[int(second)])
    assert re.search(r"\nAll \d+ checks held\.\nTry next: .*\n\Z", chosen)


@each_script
def test_help_names_every_option(script):
    done = run(script, "--help", env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0 and done.stderr == b""
    for option in (b"--list", b"--section", b"--seed", b"--ascii", b"--time", b"--predict"):
        assert option in done.stdout
    assert max(map(len, done.stdout.decode().splitlines())) <= 80


EVERYWHERE = ["--section 0", "--section 99", "--section 1,x", "--section ,", "--section 1.5", "--seed x", "--seed -1",
              "--seed 1e3", "--seed=--", "--section=--", "--nonsense", "positional", "--section", "--asci", "--seed 99999999999999999999"]
REFUSED = {
    "microattention": ["--n-heads 3", "--n-heads 0", "--dim 30", "--dim 4", "--dim x", "--n-kv-heads 3", "--window 0",
                       "--window -1", "--sinks -1", "--ranks 3", "--ranks 0", "--text=", "--text=--", "--text=  ", "--text " + "ab cd " * 200],
    "microkv": ["--prompt=", "--prompt The queen", "--prompt " + "This is the " * 30, "--max-new-tokens 0", "--max-new-tokens x",
                "--max-new-tokens 65", "--block-size 0", "--block-size -4", "--num-blocks 0", "--num-blocks 3", "--num-blocks 1000", "--max-num-seqs 0",
                "--max-num-batched-tokens 0", "--block-size 2 --num-blocks 5"],
    "microflash": ["--seq-len 0", "--seq-len 257", "--seq-len x", "--head-dim 0", "--head-dim 129", "--seq-len 256 --head-dim 9",
                   "--seq-len 65 --block-q 1 --block-k 1", "--seq-len 256 --head-dim 8 --block-q 5 --block-k 3",
                   "--block-q 0", "--block-k 0", "--block-k -4", "--sram 0", "--sram 1311", "--sram 100 --block-q 1",
                   "--n-splits 0", "--n-splits 1025", "--causal yes", "--text=", "--text=  ", "--text " + "ab cd " * 200],
    "microquant": ["--bits 1", "--bits 9", "--bits x", "--bits 4.5", "--group-size 0", "--group-size 65", "--group-size -1",
                   "--calibration-tokens 0", "--calibration-tokens 257", "--alpha 1.1", "--alpha -0.1", "--alpha nan", "--alpha x",
                   "--outliers 3", "--outliers 17,32", "--outliers 3,0.5", "--outliers 3,1001", "--outliers a,b", "--outliers -1,2",
                   "--prompt=", "--prompt queen", "--prompt " + "the " * 40],
    "microbeam": ["--prompt=", "--prompt This is the queen", "--prompt Ünï", "--prompt " + "the " * 65, "--max-new-tokens 0",
                  "--max-new-tokens 65", "--temperature 0", "--temperature -1", "--temperature nan", "--temperature x",
                  "--temperature inf", "--top-k 0", "--top-p 0", "--top-p 1.5", "--top-p nan", "--min-p -0.1", "--min-p 1.1",
                  "--width 0", "--width 17", "--length-penalty -3", "--length-penalty x", "--gamma 0", "--gamma 17",
                  "--steps 0", "--steps 201"],
}


@pytest.mark.parametrize("script, arguments", [(script, arguments) for script in SCRIPTS
                                               for arguments in EVERYWHERE + REFUSED[script.stem]],
                         ids=lambda value: value.stem if isinstance(value, Path) else value[:20])
def test_a_bad_command_line_is_refused_in_one_line(script, arguments, capfd):
    argv = ([arguments] if "=" in arguments else arguments.split(" ", 1) if arguments.startswith(("--text", "--prompt"))
            else arguments.split(" "))
    with pytest.raises(SystemExit) as stop:
        __import__(script.stem).main(argv)
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith(script.stem + ": ")


# Knobs at their edges: every check must hold all the same.
EDGES = {
    "microattention": ["--n-heads 1 --section 2,3,5,6,8", "--n-heads 8 --dim 64 --section 2,6,7,8", "--dim 8 --n-heads 8 --n-kv-heads 8",
                       "--dim 20 --n-heads 5 --section 1,3,5,8", "--window 1 --sinks 0 --section 4", "--window 9999 --sinks 9999 --section 4",
                       "--n-heads 32 --n-kv-heads 8 --ranks 16 --section 3,8", "--ranks 4 --section 8", "--n-kv-heads 1 --section 3,7,8",
                       "--dim 48 --n-heads 12 --n-kv-heads 3 --ranks 6 --section 2,3,8", "--text x", "--text=a\tb\nc --section 1,2,4",
                       "--text=Ünïcödé—日本語🙂 --section 1,2,4", "--text=16,16 --section 1,2", "--seed 1000000000",
                       "--text=\udcffbroken --section 1,2,4"],
    "microkv": ["--block-size 1 --section 5,6", "--block-size 64 --section 4", "--block-size 7 --max-num-seqs 1 --section 6,7",
                "--block-size 5 --num-blocks 5 --section 9", "--num-blocks 999 --section 9", "--num-blocks 6 --max-num-seqs 64 --section 7",
                "--max-num-seqs 64 --max-num-batched-tokens 1 --section 8", "--max-num-batched-tokens 9999 --section 8",
                "--prompt=built --max-new-tokens 1 --section 1,4,5", "--max-new-tokens 64 --section 5"],
    "microflash": ["--seq-len 1", "--seq-len 1 --head-dim 1 --block-q 1 --block-k 1 --sram 7 --section 1,3,4,6,7,8",
                   "--seq-len 13 --block-q 5 --block-k 7 --section 1,3,4,6,7,8", "--seq-len 67 --causal --section 1,3,4,6",
                   "--head-dim 1 --n-splits 7 --section 3,6,7", "--head-dim 128 --seq-len 17 --section 3,4,5,6",
                   "--seq-len 100 --head-dim 3 --block-q 4 --section 4,5,6,8", "--seq-len 31 --block-q 1 --block-k 1 --section 3,4,6,8",
                   "--block-q 1000000 --block-k 1000000 --n-splits 1 --section 3,4,6,7,8", "--block-k 1 --causal --section 3,6,7",
                   "--block-q 3 --block-k 64 --section 3,4,8", "--sram 1312 --section 3,5",
                   "--n-splits 1024 --seq-len 20 --sram 1000000000 --section 5,7", "--seed 1000000000", "--text=x --section 2,9",
                   "--text=a\tb\nc --section 2,9", "--text=Ünïcödé—日本語🙂 --section 2,9",
                   "--text=" + "the\nrat\n" * 60 + " --section 2,9", "--text=\udcffbroken --section 2,9"],
    "microquant": ["--bits 2 --group-size 7 --section 7", "--bits 8 --outliers 16,1000 --section 3,12",
                   "--bits 3 --group-size 1 --section 2", "--bits 3 --calibration-tokens 1 --section 8,9", "--group-size 64 --outliers 0,1 --section 1",
                   "--alpha 0 --section 6", "--prompt=\n --seed 7 --section 3,4,5"],
    "microbeam": ["--steps 2 --max-new-tokens 1 --section 1,2,4,5,7,8,9,10,12",
                  "--steps 1 --gamma 16 --max-new-tokens 9 --width 16 --length-penalty 4 --section 4,5,7,10",
                  "--steps 2 --gamma 1 --max-new-tokens 2 --width 1 --length-penalty -2 --section 4,6,7,9,12",
                  "--steps 2 --temperature 0.05 --top-p 1 --min-p 1 --top-k 999 --max-new-tokens 8 --section 2,3,5,12",
                  "--steps 2 --temperature 10 --top-p 1e-9 --min-p 0 --top-k 1 --max-new-tokens 8 --section 2,5,12",
                  "--prompt=T --steps 2 --max-new-tokens 30 --section 1,8,10", "--prompt=\n --steps 2 --max-new-tokens 9 --section 2,5,9",
                  "--seed 1000000000 --steps 1 --max-new-tokens 9 --section 5,11"],
}


@pytest.mark.parametrize("script, arguments", [(script, arguments) for script in SCRIPTS for arguments in EDGES[script.stem]],
                         ids=lambda value: value.stem if isinstance(value, Path) else ascii(value)[1:30])
def test_every_check_holds_with_a_knob_at_its_edge(script, arguments, capsys):
    argv = arguments.split(" ", 1) if arguments.startswith(("--text ", "--prompt ")) else arguments.split(" ")
    assert __import__(script.stem).main(argv) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and max(map(len, out.splitlines())) <= 80


@each_script
def test_a_closed_pipe_ends_quietly(script):
    process = subprocess.Popen([sys.executable, "-u", str(script), *cheap(script)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


@each_script
def test_a_full_disk_is_told_in_one_line(script):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = run(script, *cheap(script), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"cannot write") and done.stderr.count(b"\n") == 1


@each_script
def test_control_c_ends_with_130_and_no_traceback(script):
    process = subprocess.Popen([sys.executable, "-u", str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # even under nohup
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and b"Traceback" not in errors


# ---------------------------------------------------------------------------- the shared definitions

@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def module(request):
    return __import__(request.param.stem)


def test_tokenizer_round_trip_and_alphabet(module):
    tokenizer = module.Tokenizer.train(module.TEXT, 96)
    assert len(tokenizer.vocab) == len(set(tokenizer.vocab)) == 96
    assert tokenizer.vocab[:len(set(module.TEXT))] == sorted(set(module.TEXT))
    for text in (module.TEXT, "", " ", "\n\n", "This is the", "  two  blanks ", "a.b,".replace(",", "."), "horn horn"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="'q'"):
        tokenizer.encode("This is the queen")


def naive_bpe(text, vocab_size):
    """BPE from its definition: count all pairs inside words again after every merge, join the winner everywhere."""
    words = [list(word) for word in re.findall(r" ?\w+| ?[^\w\s]+|\s", text)]
    vocab, merges = sorted(set(text)), []
    while len(vocab) < vocab_size:
        counts = {}
        for word in words:
            for a, b in zip(word, word[1:]):
                counts[a, b] = counts.get((a, b), 0) + 1
        if not counts:
            break
        a, b = sorted(counts, key=lambda pair: (-counts[pair], pair))[0]
        merges.append((a, b))
        vocab += [a + b] if a + b not in vocab else []
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [a + b]
                i += 1
    return vocab, merges, [part for word in words for part in word]


@pytest.mark.parametrize("text, size", [(None, 96), (None, 999), ("aaaa aaa aa", 9), ("abcabc abc bcabca", 12), ("x", 5)])
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
    assert len(verses) == 12 and verses[0] == "This is the house that Jack built."
    assert verses[2] == "This is the rat that ate the malt that lay in the house that Jack built."
    for shorter, longer in zip(verses, verses[1:]):
        assert longer.endswith(shorter.removeprefix("This is"))


def test_softmax(module):
    assert module.softmax([]) == []
    assert module.softmax([1e4, -1e4, 1e4]) == [0.5, 0.0, 0.5]
    assert module.softmax([-float("inf"), 3.0]) == [0.0, 1.0]
    assert module.softmax([-float("inf")] * 2) == [0.0, 0.0]
    assert module.softmax([0.0, 1.0]) == pytest.approx([1 / (1 + 2.718281828459045), 1 / (1 + 1 / 2.718281828459045)], abs=1e-15)


def test_dot_takes_what_python_3_11_takes(module):
    for a, b, expected in (([], [], 0), ([2.0], (3.0,), 6.0), ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], 32.0)):
        assert module.dot(a, b) == module.dot_by_hand(a, b) == expected
