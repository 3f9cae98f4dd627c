"""The pytest plugin of this project: `python -m pytest --impl=my` grades the scripts in my/.

The parity tests run on the learner's scripts (tests/tools/exercise.py makes them) instead of the
originals. The report has one line for each technique whose code differs from the original's:

    done     all tests that call it pass
    wrong    with the smallest call whose result differs from the original's
    waits    its failing tests need another technique first
    not yet  not yet written, or not tested by the tests that ran

Without --impl, two workers of pytest-xdist share the tests, where it is installed.

Write --impl=FOLDER with "=". With a blank instead of it, pytest takes an absolute folder for the
path of a test, because it looks for its configuration before it knows this option.
"""

from __future__ import annotations

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

from tests.tools.exercise import NAMES, ROOT, source_of, techniques

LARGEST_CALL = 4000  # characters of arguments; a call with more is not compared with the original's
MOST_CALLS = 60      # of one technique in one test that are compared
LONGEST_TEST = 60    # seconds


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="FOLDER", type=Path,
                     help="grade the scripts in FOLDER (tests/tools/exercise.py makes them); "
                          "write it with '=', as in --impl=my")


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config):
    """Start two workers, unless the command line says how many.

    A wrapper runs before all plain hooks. That is needed because xdist's hook reads numprocesses.
    """
    option = config.option
    can_share = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    must_not_share = option.usepdb or option.impl is not None
    if can_share and not must_not_share and option.numprocesses is None:
        option.numprocesses = 2
    return (yield)


def pytest_configure(config):
    """With --impl: let the tests import the learner's scripts, and follow them with a Grader."""
    impl = config.option.impl
    if impl is None:
        return
    folder = (config.invocation_params.dir / impl).resolve()
    scripts = [name for name in NAMES if (folder / f"{name}.py").is_file()]
    if not scripts:
        raise pytest.UsageError(f"--impl={impl}: there is none of the scripts in it; make one with "
                                f"python tests/tools/exercise.py microattention {impl}")
    given = config.invocation_params.args
    if not any(str(argument).startswith("--tb") for argument in given):
        config.option.tbstyle = "no"
        config.option.reportchars = "N"
    ignore_the_words_of_refusals()
    sys.path.insert(0, str(folder))
    config.pluginmanager.register(Grader(config, folder, scripts), "grader")


def ignore_the_words_of_refusals():
    """Let pytest.raises ignore `match`: a learner's ValueError may have its own words."""
    original = pytest.raises

    def raises(*arguments, match=None, **options):
        return original(*arguments, **options)

    pytest.raises = raises


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep on one worker the tests of a file, or those that name the same script.

    What is expensive, such as the whole trace of a script, is then made only once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByScript(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            script = next((name for name in NAMES if name in test), "")
            return file + script

    return ByScript(config, log)


# ---------------------------------------------------------------------------- what is recorded

# A technique is identified by (script, name), called its key below.

class Call(NamedTuple):
    """A call of a technique, with copies of what went in and what came out."""

    size: int       # characters of the arguments
    key: tuple[str, str]
    original: object  # the original's function
    before: tuple     # (arguments, options)
    after: tuple      # (result or exception, arguments, options)


class Counterexample(NamedTuple):
    """A call whose result differs from the original's, as it is shown."""

    size: int
    arguments: str
    result: str
    expected: str


class Outcome(NamedTuple):
    """How a test ended."""

    test: str
    failed: bool
    waits_for: str | None  # the technique whose error ended the test
    called: frozenset      # techniques
    agreed: frozenset      # of these, those whose every call gave what the original gives
    differed: frozenset    # of these, those with a call that gave something else
    message: list[str]     # lines of the error


class Record:
    """What is noted while one test runs."""

    def __init__(self):
        self.called = set()       # techniques
        self.n_calls = Counter()  # of each
        self.calls = []           # those that can be compared
        self.unchecked = set()    # techniques with a call that cannot be compared
        self.error = None         # the latest exception that left a technique
        self.error_left = None    # the innermost technique that it left


class Grader:
    """Follows the learner's techniques through the tests, and writes the report."""

    def __init__(self, config, folder, scripts):
        self.folder = folder
        self.scripts = scripts
        self.tests_were_named = config.args_source.name == "ARGS"
        self.techniques = {}       # key: "written" or "unwritten", of those that differ
        self.outcomes = []
        self.counterexamples = {}  # key: the smallest
        self.calls_inside = {}     # key: techniques that were called while it ran
        self.running = []          # the techniques being called now, the innermost last
        self.record = Record()

    # -------------------------------------------------------------------- before the tests run

    def pytest_ignore_collect(self, collection_path):
        """Ignore all but the parity tests.

        Unless tests were named, ignore those of scripts that are not in the folder, too.
        """
        scripts = NAMES if self.tests_were_named else self.scripts
        wanted = [f"test_{name}" for name in scripts]
        if collection_path.suffix == ".py" and collection_path.stem not in wanted:
            return True
        return None

    def pytest_collection_modifyitems(self):
        for name in self.scripts:
            if name in sys.modules:
                self.watch(name, sys.modules[name])

    def watch(self, script, module):
        """Replace each technique that differs from the original by one that records its calls."""
        original = imported_original(script)
        learners_functions = functions((self.folder / f"{script}.py").read_text(encoding="utf-8"))
        for technique in techniques(source_of(script)):
            name = technique.name
            body = code(learners_functions[name]) if name in learners_functions else ""
            if body == code(technique.node):
                continue
            key = script, name
            written = body and not body.startswith("raise NotImplementedError(")
            self.techniques[key] = "written" if written else "unwritten"
            if body:
                self.watch_one(key, module, original)

    def watch_one(self, key, module, original):
        """Replace one function or method of a module by one that records its calls."""
        class_name, _, name = key[1].rpartition(".")
        owner = getattr(module, class_name) if class_name else module
        original_owner = getattr(original, class_name) if class_name else original
        value = vars(owner)[name]
        expected = vars(original_owner)[name]
        if isinstance(value, property):
            setattr(owner, name, property(self.recorded(key, value.fget, expected.fget)))
        elif inspect.isfunction(value):
            setattr(owner, name, self.recorded(key, value, expected))

    def recorded(self, key, function, original):
        """Return function, but its calls are recorded."""
        @functools.wraps(function)
        def call(*arguments, **options):
            record = self.record
            record.called.add(key)
            record.n_calls[key] += 1
            for outer in self.running:
                self.calls_inside.setdefault(outer, set()).add(key)
            outermost = key not in self.running
            before = None
            if outermost and record.n_calls[key] <= MOST_CALLS:
                before = copied((arguments, options))
            result = NotImplementedError("ended by what is no Exception, such as SystemExit")
            self.running.append(key)
            try:
                result = function(*arguments, **options)
            except Exception as error:
                result = error
                if error is not record.error:
                    record.error = error
                    record.error_left = key
                raise
            finally:
                self.running.pop()
                size = len(repr(before))
                if before is not None and size <= LARGEST_CALL:
                    after = copied((result, arguments, options))
                    if after is not None:
                        record.calls.append(Call(size, key, original, before, after))
                elif outermost:
                    record.unchecked.add(key)
            return result
        return call

    # --------------------------------------------------------------------- while the tests run

    def pytest_runtest_setup(self):
        self.record = Record()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        """Let a test that takes too long fail, such as one with a loop that never ends."""
        def stop(*_):
            raise TimeoutError(f"a test took more than {LONGEST_TEST} seconds")

        if not hasattr(signal, "SIGALRM"):  # on Windows
            return (yield)
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(LONGEST_TEST)
        try:
            return (yield)
        finally:
            signal.alarm(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Add the Outcome of a test that passed or failed."""
        report = yield
        if report.failed or (report.passed and call.when == "call"):
            self.outcomes.append(self.outcome(item.name, report.failed, call.excinfo))
        return report

    def outcome(self, test, failed, excinfo):
        """Return how a test ended. The calls of a failed test are compared with the original's."""
        record = self.record
        compared = set()
        differed = set()
        if failed:
            compared, differed = self.compare(record.calls)
        agreed = compared - differed - record.unchecked

        error = excinfo.value if excinfo else None
        waits_for = None
        if isinstance(error, NotImplementedError):
            waits_for = str(error)
        elif error is not None and error is record.error and record.error_left not in agreed:
            waits_for = record.error_left[1]

        message = []
        if failed:
            message = [line for line in excinfo.exconly().splitlines() if line.strip()][:8]
        return Outcome(test, failed, waits_for, frozenset(record.called), frozenset(agreed),
                       frozenset(differed), message)

    def compare(self, calls):
        """Repeat calls on the original. Return (techniques compared, those that differed)."""
        compared = set()
        differed = set()
        for call in sorted(calls, key=lambda call: call.size):
            key = call.key
            if key in differed or isinstance(call.after[0], NotImplementedError):
                continue
            arguments, options = call.before
            shown = [short(value) for value in arguments]
            shown += [f"{name}={short(value)}" for name, value in options.items()]
            expected = attempt(call.original, arguments, options), arguments, options
            compared.add(key)
            if same(call.after, expected):
                continue
            differed.add(key)
            known = self.counterexamples.get(key)
            if known is None or call.size < known.size:
                self.counterexamples[key] = Counterexample(
                    call.size, ", ".join(shown), *difference(call.after, expected))
        return compared, differed

    # --------------------------------------------------------------------- after the tests ran

    def suspects(self, outcome):
        """Return the techniques that explain why a test failed.

        These are the techniques that differed in it. If there is none, these are the techniques
        that it called, that differed in another test, and that are not seen to be right here.
        """
        if outcome.differed:
            return outcome.differed
        return (outcome.called & self.counterexamples.keys()) - outcome.agreed

    def verdict(self, key):
        """Return (word, lines) of the report for one technique."""
        name = key[1]
        if self.techniques[key] == "unwritten":
            return "not yet", ["not yet written"]
        tests = [outcome for outcome in self.outcomes if key in outcome.called]
        if not tests:
            return "not yet", ["written, but no test that ran calls it"]

        # A test in which it agreed with the original, and another differed, does not count.
        failed = [outcome for outcome in tests
                  if outcome.failed and not (outcome.differed and key in outcome.agreed)]
        passed = f"{len(tests) - len(failed)} of {len(tests)} tests pass"
        if not failed:
            return "done", [passed]

        wrong = set().union(*map(self.suspects, failed))
        wrong_inside = (self.calls_inside.get(key, set()) & wrong) - {key}
        if key in self.counterexamples and not wrong_inside:
            example = self.counterexamples[key]
            return "wrong", [f"{passed}; the smallest call that shows it:",
                             f"{name}({example.arguments})",
                             f"  yours     {example.result}",
                             f"  expected  {example.expected}"]
        unexplained = [
            outcome for outcome in failed
            if outcome.waits_for in (None, name)
            and not outcome.differed and not self.suspects(outcome) - {key}
        ]
        if unexplained:
            return "wrong", self.smallest_failure(key, passed, unexplained)
        names = {other for _, other in wrong_inside or wrong - {key}}
        if not names:
            names = {outcome.waits_for for outcome in failed} - {None, name}
        return "waits", [f"{passed}; for the others {', '.join(sorted(names))} must be right first"]

    def smallest_failure(self, key, passed, failed):
        """Return the lines that show the simplest of some failed tests."""
        simplest = min(failed, key=lambda outcome: (len(outcome.test), outcome.test))
        others = sorted(other for _, other in simplest.called - {key})
        doubt = f" (or it is {', '.join(others)})" if others else ""
        return [f"{passed}; the smallest that fails{doubt}: {simplest.test}", *simplest.message]

    def pytest_terminal_summary(self, terminalreporter):
        for script in self.scripts:
            self.write_grades(script, terminalreporter)

    def write_grades(self, script, reporter):
        """Write the grades of one script."""
        keys = [key for key in self.techniques if key[0] == script]
        n_originals = len(techniques(source_of(script))) - len(keys)
        reporter.section(f"{script}: {len(keys)} techniques of your own, {n_originals} as the "
                         "original")
        n_done = 0
        for key in keys:
            word, (first, *others) = self.verdict(key)
            n_done += word == "done"
            reporter.write_line(f"{word:8} {key[1]}: {first}",
                                green=word == "done", red=word == "wrong")
            for line in others:
                reporter.write_line(f"         {line}")
        if keys:
            reporter.write_line(f"{n_done} of {len(keys)} done.", bold=True)


# ---------------------------------------------------------------------- reading and repeating

def imported_original(script):
    """Return the original script as a module, imported under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"original_{script}", ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def functions(source):
    """Return {name or Class.name: node} of the functions and methods of a script."""
    found = {}
    for node in ast.parse(source).body:
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


def copied(value):
    """Return a deep copy, or None if there cannot be one."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return None


def attempt(function, arguments, options):
    """Return what a call returns, or the exception that it raises."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return error


# ------------------------------------------------------------------------ comparing and showing

def same(a, b):
    """Return whether two results are the same: numbers up to rounding, exceptions by their type."""
    if isinstance(a, float) or isinstance(b, float):
        return same_number(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b)
    if hasattr(a, "__dict__") and hasattr(b, "__dict__"):
        return same(vars(a), vars(b))
    return a == b or repr(a) == repr(b)


def same_number(a, b):
    """Return whether two values are numbers that are the same up to rounding, or both NaN."""
    try:
        both_nan = math.isnan(a) and math.isnan(b)
        return both_nan or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    except TypeError:
        return False


def difference(learners_call, originals_call):
    """Return (the learner's, the original's) as text, for two calls that differ.

    A call is (result, arguments, options). If the results are the same, the calls differ in what
    they did to an argument; then the first such argument is shown.
    """
    if not same(learners_call[0], originals_call[0]):
        return short(learners_call[0]), short(originals_call[0])
    for a, b in zip(values_of(learners_call), values_of(originals_call)):
        if same(a, b):
            continue
        if hasattr(a, "__dict__"):
            return (f"leaves {short(changed_attributes(a, b))}",
                    f"leaves {short(changed_attributes(b, a))}")
        return f"leaves {short(a)}", f"leaves {short(b)}"
    raise ValueError("the calls do not differ")


def values_of(call):
    """Return the values of all arguments of a call (result, arguments, options)."""
    _, arguments, options = call
    return [*arguments, *options.values()]


def changed_attributes(a, b):
    """Return {name: value} of the attributes of a that differ from those of b."""
    others = vars(b)
    return {name: value for name, value in vars(a).items() if not same(value, others.get(name))}


class Short(reprlib.Repr):
    """A repr that cuts what is long and gives five digits of a number."""

    def __init__(self):
        super().__init__()
        self.maxlist = 8
        self.maxtuple = 8
        self.maxstring = 200
        self.maxother = 200
        self.maxlevel = 4

    def repr_instance(self, x, level):
        if hasattr(x, "__dict__"):
            return f"{type(x).__name__} with {self.repr1(vars(x), level - 1)}"
        return repr(x)

    def repr_float(self, x, level):
        return f"{x:.5g}"


def short(value):
    """Return a value as text for the report."""
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    return Short().repr(value)
