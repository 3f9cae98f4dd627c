"""`pytest --impl my` grades the scripts in my/ (see exercise.py): the parity tests run on them, and a report follows.

For each technique that differs from the original it says: done, wrong (with the smallest call whose result differs
from the original's), waiting for another technique, or not yet written. Without --impl, two workers share the suite
where pytest-xdist is there.
"""

import ast
import copy
import functools
import importlib.util
import inspect
import math
import reprlib
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.exercise import NAMES, ROOT, techniques

LARGEST_CASE = 4000  # characters of arguments; a call with more is not kept for the report,
MOST_CASES = 60      # nor are more calls of one technique in a test
LONGEST_TEST = 60    # seconds


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="FOLDER", type=Path, help="grade the scripts in FOLDER (tests/exercise.py makes them)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    option = config.option
    if hasattr(config, "workerinput"):
        return  # this is one of the two
    if option.impl is None and config.pluginmanager.hasplugin("xdist") and option.numprocesses is None and not option.usepdb:
        option.numprocesses = 2


def pytest_configure(config):
    if (folder := config.option.impl) is None:
        return
    folder = (config.invocation_params.dir / folder).resolve()
    scripts = [name for name in NAMES if (folder / f"{name}.py").is_file()]
    if not scripts:
        raise pytest.UsageError(f"--impl {config.option.impl}: there is none of the scripts in it; make one with "
                                f"python tests/exercise.py microattention {config.option.impl}")
    if not any(argument.startswith("--tb") for argument in config.invocation_params.args):
        config.option.tbstyle, config.option.reportchars = "no", "N"
    raises = pytest.raises  # that something is refused is graded, in what words is not
    pytest.raises = lambda *arguments, match=None, **options: raises(*arguments, **options)
    sys.path.insert(0, str(folder))
    config.pluginmanager.register(Grader(config, folder, scripts), "grader")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay together, or those about one script, so that what is expensive (a trace, say) is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScript(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return file + next((name for name in NAMES if name in test), "")
    return ByScript(config, log)


# ------------------------------------------------------------------------------------- the grades

class Outcome(NamedTuple):
    """How a test ended: it waited for the technique, unwritten or not, whose error stopped it; called are all it used."""
    test: str
    failed: bool
    waits_for: str | None
    called: frozenset
    agreed: frozenset  # called, and every call compared gave what the original gives
    differed: frozenset
    message: list[str]


class Grader:
    """Follows the techniques of the scripts in a folder through the tests: who is called, who differs, who fails."""

    def __init__(self, config, folder, scripts):
        self.folder, self.scripts = folder, scripts
        self.given_tests = bool(config.args_source.name == "ARGS")
        self.techniques = {}  # (script, name): "written" or "unwritten", of those that differ from the original
        self.outcomes = []
        self.cases = {}       # (script, name): (size, arguments, result, expected result), the smallest that differs
        self.calls_inside = {}  # (script, name): techniques called while it ran
        self.running = []
        self.pytest_runtest_setup()

    def pytest_ignore_collect(self, collection_path):
        """Only parity tests; unless tests were named, only those of the scripts that are in the folder."""
        wanted = [f"test_{name}" for name in (NAMES if self.given_tests else self.scripts)]
        return True if collection_path.suffix == ".py" and collection_path.stem not in wanted else None

    def pytest_collection_modifyitems(self):
        for name in self.scripts:
            if name in sys.modules:
                self.watch(name, sys.modules[name])

    def watch(self, script, module):
        """Wrap each technique that is not the original's, to see its calls."""
        spec = importlib.util.spec_from_file_location(f"original_{script}", ROOT / f"{script}.py")
        original = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(original)
        mine = functions((self.folder / f"{script}.py").read_text(encoding="utf-8"))
        theirs = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for technique, _, node in techniques(theirs):
            body = code(mine[technique]) if technique in mine else ""
            if body != code(node):
                written = body and not body.startswith("raise NotImplementedError(")
                self.techniques[script, technique] = "written" if written else "unwritten"
            if body and body != code(node):
                owner, _, name = technique.rpartition(".")
                owner = getattr(module, owner) if owner else module
                value = vars(owner)[name]
                whose = getattr(original, owner.__name__) if owner is not module else original
                compare = vars(whose)[name]
                if isinstance(value, property):
                    setattr(owner, name, property(self.watched((script, technique), value.fget, compare.fget)))
                elif inspect.isfunction(value):
                    setattr(owner, name, self.watched((script, technique), value, compare))

    def watched(self, key, function, original):
        """function, noting its calls; with small arguments they are kept, to be repeated on the original."""
        @functools.wraps(function)
        def call(*arguments, **options):
            self.called.add(key)
            for outer in self.running:
                self.calls_inside.setdefault(outer, set()).add(key)
            self.n_calls[key] += 1
            keep = self.n_calls[key] <= MOST_CASES and key not in self.running
            kept = attempt(lambda: copy.deepcopy((arguments, options))) if keep else None
            self.running.append(key)
            try:
                result = function(*arguments, **options)
            except Exception as error:
                if error is not self.raised[0]:
                    self.raised = error, key  # the innermost technique that it left
                result = error
                raise
            finally:
                self.running.pop()
                if kept and not isinstance(kept, Exception) and (size := len(repr(kept))) <= LARGEST_CASE:
                    after = attempt(lambda: copy.deepcopy((result, arguments, options)))
                    self.calls.append((size, key, original, kept, after))
                elif key not in self.running:
                    self.unchecked.add(key)
            return result
        return call

    def pytest_runtest_setup(self):
        self.called, self.calls, self.unchecked, self.n_calls, self.raised = set(), [], set(), Counter(), (None, None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self):
        """A loop that never ends fails its test, and no more."""
        def too_long(*_):
            raise TimeoutError(f"a test took more than {LONGEST_TEST} seconds")
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, too_long)
            signal.alarm(LONGEST_TEST)
        yield
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if report.skipped or report.passed and call.when != "call":
            return
        error = call.excinfo and call.excinfo.value
        waits_for = str(error) if isinstance(error, NotImplementedError) else None
        message = [line for line in call.excinfo.exconly().splitlines() if line.strip()][:8] if report.failed else []
        compared, differed = set(), set()
        calls = sorted(self.calls, key=lambda call: call[0]) if report.failed else []
        for size, key, original, (arguments, options), after in calls:
            if key in differed or isinstance(after, Exception) or isinstance(after[0], NotImplementedError):
                continue
            shown = ", ".join([*map(short, arguments), *(f"{name}={short(value)}" for name, value in options.items())])
            expected = attempt(lambda: original(*arguments, **options)), arguments, options
            compared.add(key)
            if not same(after, expected):
                differed.add(key)
                if size < self.cases.get(key, (math.inf,))[0]:
                    self.cases[key] = size, shown, *difference(after, expected)
        agreed = compared - differed - self.unchecked
        if error is not None and error is self.raised[0] and waits_for is None and self.raised[1] not in agreed:
            waits_for = self.raised[1][1]
        self.outcomes.append(Outcome(item.name, report.failed, waits_for, frozenset(self.called), frozenset(agreed),
                                     frozenset(differed), message))

    def verdict(self, key):
        """(word, lines) for one technique."""
        name = key[1]
        if self.techniques[key] == "unwritten":
            return "not yet", ["not yet written"]
        tests = [outcome for outcome in self.outcomes if key in outcome.called]
        failed = [outcome for outcome in tests if outcome.failed and not (outcome.differed and key in outcome.agreed)]
        waits = sorted({outcome.waits_for for outcome in failed if outcome.waits_for} - {name})
        passed = f"{len(tests) - len(failed)} of {len(tests)} tests pass"
        wrong = {other for outcome in failed
                 for other in outcome.differed or (outcome.called & self.cases.keys()) - outcome.agreed}
        unexplained = [outcome for outcome in failed if outcome.waits_for in (None, name) and not outcome.differed
                       and not (outcome.called & self.cases.keys()) - outcome.agreed - {key}]
        inner = sorted(inside[1] for inside in self.calls_inside.get(key, ()) if inside != key and inside in wrong)
        blamed = inner or sorted({other for _, other in wrong - {key}})
        if key in self.cases and not inner:
            _, arguments, result, expected = self.cases[key]
            return "wrong", [f"{passed}; the smallest call that shows it:", f"{name}({arguments})",
                             f"  yours     {result}", f"  expected  {expected}"]
        if unexplained:
            first = min(unexplained, key=lambda o: (len(o.test), o.test))
            others = sorted(other for _, other in first.called - {key})
            doubt = f" (or it is {', '.join(others)})" if others else ""
            return "wrong", [f"{passed}; the smallest that fails{doubt}: {first.test}", *first.message]
        if failed:
            return "waits", [f"{passed}; for the others {', '.join(blamed or waits)} must be right first"]
        return ("done", [passed]) if tests else ("not yet", ["written, but no test that ran calls it"])

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        for script in self.scripts:
            keys = [key for key in self.techniques if key[0] == script]
            originals = len(all_techniques(script)) - len(keys)
            terminalreporter.section(f"{script}: {len(keys)} techniques of your own, {originals} as the original")
            grades = {key: self.verdict(key) for key in keys}
            for key, (word, (first, *more)) in grades.items():
                write(f"{word:8} {key[1]}: {first}", **{"done": {"green": True}, "wrong": {"red": True}}.get(word, {}))
                for line in more:
                    write(f"         {line}")
            if keys:
                done = sum(word == "done" for word, _ in grades.values())
                write(f"{done} of {len(keys)} done.", bold=True)


def all_techniques(script):
    """The techniques of a script."""
    return techniques((ROOT / f"{script}.py").read_text(encoding="utf-8"))


def functions(source):
    """{name or Class.name: node} of a script's functions and methods."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}": method for method in node.body if isinstance(method, ast.FunctionDef)}
    return found


def code(node):
    """A function's body as text, without its docstring and comments."""
    return "\n".join(map(ast.unparse, node.body[ast.get_docstring(node) is not None:]))


def attempt(action):
    """What action returns, or the exception it raises."""
    try:
        return action()
    except Exception as error:
        return error


def same(a, b):
    """Are two results the same, numbers to within rounding, exceptions by their kind?"""
    if isinstance(a, float) or isinstance(b, float):
        try:
            return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) or a != a and b != b
        except TypeError:
            return False
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b)
    if hasattr(a, "__dict__") and hasattr(b, "__dict__"):
        return same(vars(a), vars(b))
    return a == b or repr(a) == repr(b)


def difference(mine, theirs):
    """Two reports of a call, (result, arguments, options), as shown: the results, or what became of the arguments."""
    if same(mine[0], theirs[0]):
        mine, theirs = ([*arguments, *options.values()] for _, arguments, options in (mine, theirs))
        a, b = next((a, b) for a, b in zip(mine, theirs) if not same(a, b))
        if hasattr(a, "__dict__"):
            a, b = ({name: value for name, value in vars(x).items() if not same(value, vars(y).get(name))}
                    for x, y in ((a, b), (b, a)))
        return f"leaves {short(a)}", f"leaves {short(b)}"
    return short(mine[0]), short(theirs[0])


class Short(reprlib.Repr):
    """Numbers with five digits, and no more of a value than fits a few lines."""
    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = 8
        self.maxstring = self.maxother = 200
        self.maxlevel = 4

    def repr_instance(self, x, level):
        return f"{type(x).__name__} with {self.repr1(vars(x), level - 1)}" if hasattr(x, "__dict__") else repr(x)

    def repr_float(self, x, level):
        return f"{x:.5g}"


def short(value):
    """A value for the report."""
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else Short().repr(value)
