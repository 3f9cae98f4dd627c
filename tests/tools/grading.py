"""The pytest plugin of this project: `.venv/bin/python -m pytest --impl=my` grades what is in my/.

The parity tests run on the learner's scripts (tests/tools/exercise.py makes them) instead of the
originals. What is printed is a grade of each technique that the learner has to write, one a line:

    done     its tests pass; "so far" where only some of them ran
    wrong    with the smallest call whose result differs from the original's
    too slow but what it returned was right, as far as it was compared
    not yet  not written yet
    no test  written, but no test that ran calls it, such as with -k

The last line says what to mend or to write next, in the order of the file. Where only some tests
ran, as with -k, the first line says so: what is done by those may still fail in the others.

A mistake in one technique, or one that is not written yet, makes no other one wrong. For a test
runs first with all that the learner has written, and with the original's techniques for the rest.
If it fails, or takes long, it runs with the original's techniques alone, and each call of one is
repeated with the learner's on a copy of the arguments. Where both give the same, the learner's is
not to blame. The others are tried together, with the original's for the rest; if the test fails,
each half of them is tried, and so on, until those are found that make it fail alone.

A grade takes about as long as the tests do. A wrong technique is looked into for LONGEST_BLAMED
seconds; then the original's takes its place, and its other tests are skipped. The tests of a script
get LONGEST_GRADE seconds. First come those that are best for one technique (exercise.py --list
names them), so that what is cut off tells least. All these are seconds of this process, not of
the clock, so that a busy machine makes nobody's code too slow. Where nothing is written yet, none
of the script's tests runs. Nor do the tests of what the experiments find, which take long.

Without --impl, two workers of pytest-xdist share the tests, where it is installed.

Write --impl=FOLDER with "=". With a blank instead of it, pytest takes an absolute folder for the
path of a test, because it looks for its configuration before it knows this option.
"""

from __future__ import annotations

import ast
import copy
import functools
import gc
import inspect
import itertools
import math
import reprlib
import signal
import sys
import textwrap
import time
import traceback
from collections import Counter, deque
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tools.exercise import (
    NAMES,
    ROOT,
    WIDTH,
    code_of,
    functions_of,
    is_written,
    listed_tests,
    parsed,
    read,
    source_of,
    taken_out_before,
    techniques,
)
from tests.tools.importing import compiled, imported, is_property, missing, problem_of

MOST_CALLS = 60         # of one technique in one test that are repeated
LONGEST_REPEATS = 0.2   # seconds that the repeated calls of one technique in one test may take
LONGEST_ALL = 2         # seconds that all repeated calls in one test may take
MOST_ITEMS = 1000       # of a generator that are compared
LONGEST_FIRST = 1       # seconds that a test may take with several techniques of the learner, or
                        # else they are tried alone; after the best tests have run: ...
LONGEST_LATER = 5       # ... this many, as what never ends is known then
TIMES_FIRST = 3         # if the originals take long: this many times what they take
LONGEST = 3             # seconds that a call, or a test with one technique, may take, or ...
TIMES_AS_LONG = 10      # ... this many times what the original's takes, if that is more
LONGEST_ORIGINAL = 120  # seconds that a test may take with the original's techniques
LONGEST_SEARCH = 5      # seconds that finding out why one test fails may take
LONGEST_BLAMED = 2      # seconds in which one technique may be found wrong, again and again
LONGEST_GRADE = 100     # seconds that the tests of one script may take
OFTEN = 0.25            # seconds, at most, between two looks whether a time limit is reached
INDENT = " " * 9        # of the details below a grade
DETAILS = WIDTH - len(INDENT)  # columns of such a line
MOST_LINES = 8          # of a call that is shown whole, or of an error
MOST_PARTS = 200        # numbers, texts and the like that can fit into these lines
NO_BREAK = "\xa0"       # a space at which no line ends
ROWS = (list, tuple, deque, bytes)  # what has items in places 0, 1, ...


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="FOLDER", type=Path,
                     help="grade the scripts in FOLDER (tests/tools/exercise.py makes them); "
                          "write it with '=', as in --impl=my")


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config):
    """Start two workers, unless the command line says how many. A grade is made by one process.

    A wrapper runs before all plain hooks. That is needed because xdist's hook reads numprocesses.
    """
    option = config.option
    can_share = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if can_share and option.impl is not None:
        option.numprocesses = 0
    elif can_share and not option.usepdb and option.numprocesses is None:
        option.numprocesses = 2
    return (yield)


def pytest_configure(config):
    """With --impl: let the tests import the learner's scripts, and follow them with a Grader."""
    # Syntax trees and tests are many objects that stay. Looking for garbage among them this seldom
    # saves a twentieth of all work.
    gc.set_threshold(100_000, 50, 100)
    impl = config.option.impl
    if impl is None:
        return
    folder = (config.invocation_params.dir / impl).resolve()
    scripts = [name for name in NAMES if (folder / f"{name}.py").is_file()]
    if not scripts:
        raise pytest.UsageError(f"--impl={impl}: {folder} is no folder with one of the scripts in "
                                f"it; make one with python3 tests/tools/exercise.py {NAMES[0]} my")
    if folder == ROOT:
        raise pytest.UsageError(f"--impl={impl}: these are the originals; give the folder of your "
                                "exercise, as in --impl=my")
    tests_were_named = config.args_source.name == "ARGS"
    if not tests_were_named:  # pytest may have been started in the learner's folder
        config.args = [str(ROOT / "tests")]
    given = [str(argument) for argument in config.invocation_params.args]
    wants_details = any(argument.startswith(("--tb", "-v", "--verbose")) for argument in given)
    if not wants_details:
        config.option.tbstyle = "no"
        config.option.reportchars = "N"
        config.option.verbose = -2  # without the line that counts tests
    config.option.continue_on_collection_errors = True
    ignore_the_words_of_refusals()
    sys.path.insert(0, str(folder))
    grader = Grader(folder, impl, scripts, tests_were_named, wants_details, config.option.keyword)
    config.pluginmanager.register(grader, "grader")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    """Leave all objects to the end of the process, where pytest and Python look for garbage again.

    That would take seconds, as there are many.
    """
    gc.freeze()


def ignore_the_words_of_refusals():
    """Let pytest.raises ignore `match`: a learner's ValueError may have its own words."""
    original = pytest.raises

    def raises(*arguments, match=None, **options):
        return original(*arguments, **options)

    pytest.raises = raises


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep on one worker the tests of a file, or those that name the same script.

    What is expensive, such as the whole trace of a script, is then made only once. The tests of the
    exercises share nothing, but for those of a class, so each may go to any worker. xdist starts
    the largest groups first: those single tests come last, and keep both workers busy to the end.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByScript(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if file.endswith("test_exercise.py"):
                in_class, _, _ = test.rpartition("::")
                return file + in_class if in_class else nodeid
            script = next((name for name in NAMES if name in test), "")
            return file + script

    return ByScript(config, log)


# -------------------------------------------------------------------------- one technique's grade

class NeverEnds(BaseException):
    """A call or a test took too long. (No Exception, so that a learner's code does not catch it.)
    """


# What else a call or a test may raise. The last two are no Exception: exit() raises SystemExit, and
# pytest.raises fails a test with the other one where nothing is raised.
MISTAKES = (Exception, SystemExit, pytest.fail.Exception)


class Counterexample(NamedTuple):
    """A call whose result differs from the original's, as it is shown."""

    rank: tuple  # what is smaller is shown rather
    lines: list[str]


class Failure(NamedTuple):
    """A test that fails because of one technique."""

    test: str
    message: list[str]


class Grade:
    """What is known about one technique of the learner's."""

    def __init__(self, script, name, state, line):
        self.script = script
        self.name = name
        self.line = line           # of its definition in the learner's file, or where it belongs
        self.state = state         # "written", "not written", "missing" or "the original's"
        self.n_tests = 0           # that call it
        self.failures = []
        self.counterexample = None  # the smallest, if possible one that is not to be refused
        self.never_ends = None     # the lines that show the call or the test
        self.n_agreed = 0          # calls that were compared, and do what the original's does
        self.is_too_slow = False   # a test with it never ends, but its calls do, and agree
        self.seconds_blamed = 0.0  # that finding out about its failures has taken
        self.n_skipped = 0         # tests that call it, after it has used up its time

    def is_open(self):
        """Return whether the learner has written this, and more tests may tell more about it."""
        return (self.state == "written" and not self.never_ends
                and self.seconds_blamed < LONGEST_BLAMED)

    def word(self):
        """Return "done", "wrong", "too slow", "not yet" or "no test"."""
        if self.state == "the original's":
            return "done"
        if self.state != "written":
            return "not yet"
        if self.n_tests == 0:
            return "no test"
        if self.is_too_slow:
            return "too slow"
        if self.never_ends or self.failures:
            return "wrong"
        return "done"

    def lines(self):
        """Return the lines of the report: the first is a sentence, the others are details."""
        if self.state == "the original's":
            return ["the same code as the original's"]
        if self.state == "missing":
            return [f"not there: your file has no function {self.name}; put its def line back"]
        if self.never_ends:
            longer = (f"takes more than {LONGEST} seconds and {TIMES_AS_LONG} times what the "
                      "original's takes")
            if self.is_too_slow:
                n_calls = f"{self.n_agreed} call{'' if self.n_agreed == 1 else 's'}"
                what = f"{longer}, but is right in {n_calls} that could be compared"
            else:
                what = f"never ends, or {longer}"
            return [f"{what}; its other tests are skipped", *self.never_ends]
        results = self.results()
        if self.n_skipped:
            results += f", {self.n_skipped} more {'is' if self.n_skipped == 1 else 'are'} skipped"
        if not self.failures:
            return [results]
        if self.counterexample:
            return [f"{results}; the smallest call that shows it:", *self.counterexample.lines]
        simplest = min(self.failures, key=lambda failure: (len(failure.test), failure.test))
        return [f"{results}; the smallest that fails: {simplest.test}", *simplest.message]

    def results(self):
        """Return how many of its tests fail, or that they pass, as words."""
        n_failed = len(self.failures)
        if self.n_tests == 1:
            return "its test fails" if n_failed else "its test passes"
        if 0 < n_failed < self.n_tests:
            return f"{n_failed} of its {self.n_tests} tests {'fails' if n_failed == 1 else 'fail'}"
        return f"its {self.n_tests} tests {'fail' if n_failed else 'pass'}"


# ------------------------------------------------------------------------------------ the grader

class StatusLine:
    """A line on the terminal that says what is going on, and is gone in the end."""

    def __init__(self, stream):
        self.stream = stream
        self.width = 0  # of what it says now

    def show(self, text):
        """Say something in place of what it says now, if the stream is a terminal."""
        if not self.stream.isatty():
            return
        text = text[:WIDTH - 1]
        self.stream.write("\r" + text.ljust(self.width) + "\r" + text)
        self.stream.flush()
        self.width = len(text)


class Grader:
    """Runs the tests on the learner's techniques and on the original's, and writes the grades.

    A technique is identified by (script, name), called its key.
    """

    def __init__(self, folder, shown_folder, scripts, tests_were_named, wants_details, keyword=""):
        self.folder = folder
        self.shown_folder = shown_folder
        self.scripts = scripts
        self.tests_were_named = tests_were_named
        self.wants_details = wants_details
        self.keyword = keyword  # of -k
        self.problems = {}   # script: the line that says why it cannot be imported
        self.untouched = set()  # scripts in which nothing is written yet, and nothing else changed
        self.grades = {}     # key: Grade, in the order of the files
        self.originals = {}  # key: the original's function, in the learner's module
        self.broken_tests = []  # that fail with the original's techniques
        self.n_tests = 0        # that run
        self.scripts_with_tests = set()  # that run
        self.n_left_out = 0     # tests that do not run, as with -k
        self.n_too_late = 0     # tests that do not run because the others have taken long
        self.n_begun = 0        # tests that have begun to run
        self.status = StatusLine(sys.stderr)
        self.seconds = Counter()  # script: what its tests have taken
        self.best_tests = set(listed_tests().values())  # each for one technique

        self.learners = frozenset()  # keys of the techniques whose calls go to the learner's
        self.repeats = frozenset()   # keys of those whose calls are repeated with the learner's
        self.inner_seconds = 0.0     # of the learner's techniques that the running one has called
        self.own_seconds = Counter()  # of the learner's techniques, without those that they call
        self.called = set()         # keys, in this test
        self.undecided = set()      # keys of those that may make this test fail, or may not
        self.unchecked = set()      # keys with a call that was not repeated, in this test
        self.differed = set()       # keys with a call that differed, in this test
        self.n_repeated = Counter()       # calls of each key, in this test
        self.time_repeated = Counter()    # seconds of each key, in this test
        self.seconds_repeated = 0.0       # of all keys
        self.fixtures = {}                # of this test
        self.has_cached = False     # whether what this test has cached makes a difference
        for script in scripts:
            self.take_in(script)

    # ----------------------------------------------------------------------- before the tests run

    def take_in(self, script):
        """Import the learner's script and make a Grade of each technique, or note the problem."""
        path = self.path(script)
        self.status.show(f"grading: reading {path.name}")
        self.problems[script] = problem_of(script, path)
        if self.problems[script]:
            return
        source = read(path)
        original_source = source_of(script)
        absent = {technique.name for technique in missing(script, source)}
        learners_functions = functions_of(parsed(source))
        was_taken_out = taken_out_before(self.folder)
        for technique in techniques(original_source):
            name = technique.name
            if name in absent:
                state = "missing"
            elif not is_written(learners_functions[name]):
                state = "not written"
            elif code_of(learners_functions[name]) != code_of(technique.node):
                state = "written"
            elif f"{script}.{name}" in was_taken_out:
                state = "the original's"
            else:
                continue
            if state == "missing":
                line = line_for(name, source, original_source)
            else:
                line = learners_functions[name].lineno
            self.grades[script, name] = Grade(script, name, state, line)
        states = {grade.state for grade in self.grades.values() if grade.script == script}
        if "written" not in states and not other_changes(source, original_source):
            self.untouched.add(script)

        module = imported(script, path, functools.partial(self.followed, script))
        for technique in techniques(original_source):
            function = defined_in(module, technique)
            self.originals[script, technique.name] = function

    def followed(self, script, name):
        """Return a decorator for a technique: its calls go through self.call."""
        key = script, name

        def decorate(value):
            if isinstance(value, property):
                return property(decorate(value.fget))
            if not callable(value):  # such as a classmethod
                return value

            @functools.wraps(value)
            def call(*arguments, **options):
                return self.call(key, value, arguments, options)
            return call
        return decorate

    def pytest_ignore_collect(self, collection_path):
        """Ignore all but the parity tests of scripts that can be imported.

        Unless tests were named, ignore those of scripts that are not in the folder, too.
        """
        if collection_path.suffix != ".py":
            return None
        scripts = NAMES if self.tests_were_named else self.scripts
        wanted = [f"test_{name}" for name in scripts if not self.problems.get(name)]
        return None if collection_path.stem in wanted else True

    def pytest_deselected(self, items):
        """Count the tests that do not run."""
        self.n_left_out += len(items)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """Let the best test of each technique run before the other tests of its script.

        What an experiment finds takes long to test, and says little about a technique. Such a test
        only runs if a technique has no better one.
        """
        items[:] = [item for item in items if not item.originalname.startswith("test_finding")
                    or item.originalname in self.best_tests]
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path),
                                     item.originalname not in self.best_tests))

    def pytest_collection_finish(self, session):
        """Count the tests that run."""
        self.n_tests = len(session.items)
        self.scripts_with_tests = {item.path.stem.removeprefix("test_") for item in session.items}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """Leave out the tests of a script in which there is nothing to grade."""
        return item.path.stem.removeprefix("test_") in self.untouched or None

    def pytest_runtest_logstart(self):
        """Say on the terminal which test begins."""
        self.n_begun += 1
        self.status.show(f"grading: {self.n_begun} of {self.n_tests} tests")

    # ----------------------------------------------------------------------- while the tests run

    def call(self, key, learners, arguments, options):
        """Call the learner's technique or the original's. Repeat the call, if it is time for it."""
        if key not in self.originals:  # while the script is imported
            return learners(*arguments, **options)
        self.called.add(key)
        if key in self.learners:
            return self.timed(key, learners, arguments, options)
        original = self.originals[key]
        if key in self.repeats and self.grades[key].is_open():
            return self.call_and_repeat(key, original, learners, arguments, options)
        return original(*arguments, **options)

    def timed(self, key, learners, arguments, options):
        """Call the learner's technique, and note how long it takes without those that it calls."""
        others = self.inner_seconds
        self.inner_seconds = 0.0
        start = time.perf_counter()
        try:
            return learners(*arguments, **options)
        finally:
            seconds = time.perf_counter() - start
            self.own_seconds[key] += seconds - self.inner_seconds
            self.inner_seconds = others + seconds

    def call_and_repeat(self, key, original, learners, arguments, options):
        """Call the original's technique, and the learner's on a copy. Compare what they do."""
        may_repeat = (self.n_repeated[key] < MOST_CALLS
                      and self.time_repeated[key] < LONGEST_REPEATS
                      and self.seconds_repeated < LONGEST_ALL)
        if not may_repeat:
            self.unchecked.add(key)
            return original(*arguments, **options)
        start = time.process_time()
        before = copied((arguments, options))
        if before is None:
            self.unchecked.add(key)
            return original(*arguments, **options)
        self.n_repeated[key] += 1
        start_of_call = time.process_time()
        result = attempt(original, arguments, options)
        seconds = time.process_time() - start_of_call
        with self.using({key}):
            yields = inspect.isgenerator(result)
            if yields:  # it has not begun: the arguments are as they were
                after = copied((arguments, options))
                expected = attempt_all(original, *after, yields), *after
            else:
                expected = result, arguments, options
            self.compare(key, learners, before, expected, seconds, yields)
        seconds = time.process_time() - start
        self.time_repeated[key] += seconds
        self.seconds_repeated += seconds
        if isinstance(result, MISTAKES):
            raise result
        return result

    def compare(self, key, learners, before, expected, seconds, yields):
        """Call the learner's technique, and note whether it does what is expected.

        before: (arguments, options). expected: what the original's call has come to, as
        (result, arguments, options), in the given seconds. yields: whether it is a generator.
        """
        grade = self.grades[key]
        shown = copied(before)
        try:
            with time_limit(longest_for(seconds)):
                result = attempt_all(learners, *before, yields)
        except NeverEnds:
            grade.never_ends, _ = call_as_lines(grade.name, *shown)
            return
        outcome = result, *before
        if is_opaque(result) and is_opaque(expected[0]):
            self.unchecked.add(key)
            return
        are_same = same(outcome, expected)
        if are_same and other_kind(outcome[0], expected[0]) is None:
            grade.n_agreed += 1
            return
        self.differed.add(key)
        # A function among the arguments may draw at random, and so give the two calls other values.
        call, is_cut = call_as_lines(grade.name, *shown)
        rank = (any(map(is_opaque, values_of(expected))), isinstance(expected[0], MISTAKES), is_cut,
                are_same, size_of(shown) + size_of(expected[0]), len("".join(call)))
        if grade.counterexample is None or rank < grade.counterexample.rank:
            if are_same:
                lines = lines_of_kinds(*other_kind(outcome[0], expected[0]))
            else:
                names = names_of_arguments(self.originals[key], *shown)
                lines = difference(outcome, expected, self.path(key[0]), shown, names)
            grade.counterexample = Counterexample(rank, [*call, *lines])

    @contextmanager
    def using(self, keys, repeats=frozenset()):
        """Use the learner's techniques with these keys, and the original's for all others.

        repeats: the keys of those whose calls are repeated with the learner's.
        """
        old = self.learners, self.repeats
        self.learners = frozenset(keys)
        self.repeats = frozenset(repeats)
        try:
            yield
        finally:
            self.learners, self.repeats = old

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """Run a test as often as grading the learner's techniques takes.

        In the end it fails, is skipped, or passes as they let it.
        """
        names = pyfuncitem._fixtureinfo.argnames
        fixtures = {name: pyfuncitem.funcargs[name] for name in names}

        def run():
            for name in {"capsys", "capfd"} & fixtures.keys():
                fixtures[name].readouterr()  # forget what an earlier run has printed
            pyfuncitem.obj(**fixtures)

        script = pyfuncitem.path.stem.removeprefix("test_")
        if self.seconds[script] > LONGEST_GRADE:
            self.n_too_late += 1
            pytest.skip("the other tests have taken long")
        start = time.process_time()
        self.called = set()
        self.fixtures = fixtures
        self.has_cached = False
        self.undecided = set()
        was_open = self.open_keys()
        is_best = pyfuncitem.originalname in self.best_tests
        longest = LONGEST_FIRST if is_best else LONGEST_LATER
        error = self.error_of_test(pyfuncitem.name, run, longest)
        self.seconds[script] += time.process_time() - start
        for key in self.called & self.grades.keys():
            grade = self.grades[key]
            if grade.state == "written" and (key not in was_open or key in self.undecided):
                grade.n_skipped += 1
            else:
                grade.n_tests += 1
        if error is not None:
            raise error
        unwritten = [grade.name for key, grade in self.grades.items()
                     if key in self.called and grade.state != "written"]
        if unwritten:
            pytest.skip(f"not written yet: {', '.join(unwritten)}")
        return True

    def open_keys(self):
        """Return the keys of the techniques about which more tests may tell more."""
        return {key for key, grade in self.grades.items() if grade.is_open()}

    def error_of_test(self, test, run, longest):
        """Return the error of a test that the learner's techniques make fail, or else None.

        longest: how many seconds it may take with all of them, if the originals take less.
        """
        keys = self.open_keys()
        error = self.error_with(keys, run, longest)
        if isinstance(error, NeverEnds):  # the original's may take as long
            seconds = self.run_with_originals(test, run)
            if seconds is None:
                return None
            if seconds * TIMES_FIRST > longest:
                error = self.error_with(keys, run, seconds * TIMES_FIRST)
        if error is None:
            return None
        start = time.process_time()
        errors = self.errors_of_each(test, run)
        if self.has_cached:
            self.forget_what_is_cached()
        for key in errors:
            self.grades[key].seconds_blamed += time.process_time() - start
        return next(iter(errors.values()), None)

    def error_with(self, keys, run, seconds):
        """Return the error of a test with the learner's techniques with these keys, or None.

        What is not among them is the original's. The error is NeverEnds if that takes longer.
        """
        if self.has_cached:
            self.forget_what_is_cached()
        try:
            with self.using(keys), time_limit(seconds):
                run()
        except (*MISTAKES, NeverEnds) as error:
            return error
        return None

    def errors_of_each(self, test, run):
        """Find out which of the learner's techniques make a test fail, as {key: error}.

        Run it with the original's techniques, and repeat their calls; those that agree are not to
        blame. Those that have failed in other tests may be the only ones to blame.
        """
        keys = self.open_keys()
        wrong = {key for key in keys & self.called if self.grades[key].failures}
        if wrong and self.error_with(keys - wrong, run, LONGEST_FIRST) is None:
            keys = wrong
        self.unchecked = set()
        self.differed = set()
        self.n_repeated.clear()
        self.time_repeated.clear()
        self.seconds_repeated = 0.0
        last_start = time.process_time() + LONGEST_SEARCH
        seconds = self.run_with_originals(test, run, keys)
        if seconds is None:
            return {}
        suspects = self.differed | self.unchecked or self.called
        suspects = [key for key in self.grades if key in suspects & keys & self.open_keys()]
        new = [key for key in suspects if key not in wrong]
        groups = [[key] for key in suspects if key in wrong]
        groups.append([key for key in new if key in self.differed])
        groups.append([key for key in new if key not in self.differed])
        groups = [group for group in groups if group]
        errors = {}
        for group in groups:
            errors |= self.errors_in(group, test, run, seconds, last_start)
        return errors

    def run_with_originals(self, test, run, keys=frozenset()):
        """Run a test with the original's techniques, and repeat the calls of those with these keys.

        If it fails, run it once more without repeating them: it may be one that counts them. If it
        fails again, forget what is cached, which a wrong technique may have made. Return its
        seconds, or None if it fails all the same: then something else in the file is broken.
        """
        for repeats in (frozenset(keys), frozenset(), None):
            if repeats is None:
                self.has_cached = True
                self.forget_what_is_cached()
                repeats = frozenset()
            start = time.process_time()
            try:
                with self.using(frozenset(), repeats), time_limit(LONGEST_ORIGINAL):
                    run()
                if keys and not repeats:
                    self.unchecked |= self.called
                return time.process_time() - start
            except (*MISTAKES, NeverEnds) as error:
                message = message_of(error, None)
        self.broken_tests.append(Failure(test, message))
        return None

    def forget_what_is_cached(self):
        """Empty the caches of the scripts' functions, and of the objects that the test is given."""
        for script in self.scripts:
            module = sys.modules.get(script)
            for value in vars(module).values() if module else ():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        for value in self.fixtures.values():
            for name in list(getattr(value, "__dict__", ())):
                if isinstance(getattr(type(value), name, None), functools.cached_property):
                    del vars(value)[name]

    def errors_in(self, keys, test, run, seconds, last_start):
        """Return {key: error} of those of the learner's techniques that alone make a test fail.

        keys: a list. If the test passes with all of them, that is none. Or else each half is tried.
        seconds: what the test takes with the original's techniques. last_start: when it may start
        for the last time, in seconds of this process; those that are left then are undecided.
        """
        if time.process_time() > last_start:
            self.undecided |= set(keys)
            return {}
        if len(keys) == 1:
            error = self.error_alone(keys[0], test, run, seconds)
            return {} if error is None else {keys[0]: error}
        longest = max(LONGEST_FIRST, TIMES_FIRST * seconds)
        if self.error_with(keys, run, longest) is None:
            return {}
        middle = len(keys) // 2
        return (self.errors_in(keys[:middle], test, run, seconds, last_start)
                | self.errors_in(keys[middle:], test, run, seconds, last_start))

    def error_alone(self, key, test, run, seconds):
        """Return the error of a test with one of the learner's techniques, or None if it passes."""
        grade = self.grades[key]
        error = self.error_with({key}, run, longest_for(seconds))
        if isinstance(error, NeverEnds):
            grade.never_ends = [f"in the test {test}"]
            grade.is_too_slow = (grade.n_agreed > 0 and not grade.counterexample
                                 and not grade.failures)
            return TimeoutError(f"{grade.name} never ends")
        if error is not None:
            grade.failures.append(Failure(test, message_of(error, self.path(key[0]))))
        return error

    def pytest_collectreport(self, report):
        """Note that the tests of a script cannot be read, as when a constant is gone from it."""
        script = Path(report.nodeid).stem.removeprefix("test_")
        if report.failed and script in self.problems:
            errors = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.problems[script] = f"its tests cannot start: {errors[-1][2:].strip()}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Note that a test cannot start."""
        report = yield
        if report.failed and call.when == "setup":
            message = message_of(call.excinfo.value, None)
            self.broken_tests.append(Failure(item.name, message))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """Print no letter for a test: the grade is the output."""
        if self.wants_details:
            return None
        return report.outcome, "", ""

    # ----------------------------------------------------------------------- after the tests ran

    def path(self, script):
        """Return the path of the learner's script."""
        return self.folder / f"{script}.py"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        """Set the exit status: 0 if all is done. Clear the line that said what is going on."""
        self.status.show("")
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED,
                              pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        well = ("done", "no test") if self.is_partial() else ("done",)
        all_done = all(grade.word() in well for grade in self.grades.values()
                       if self.is_asked_for(grade.script))
        if self.broken_tests or any(self.problems.values()) or not all_done:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Write the grades."""
        self.write_what_ran(terminalreporter)
        if self.keyword and self.n_tests == 0 and not any(self.problems.values()):
            return
        for script in self.scripts:
            if self.is_asked_for(script) or self.problems[script]:
                self.write_grades(script, terminalreporter)
        if self.broken_tests:
            self.write_broken_tests(terminalreporter)

    def is_partial(self):
        """Return whether the grades rest on some of the tests only, as with -k."""
        return bool(self.n_left_out or self.n_too_late or self.tests_were_named)

    def is_asked_for(self, script):
        """Return whether tests of a script ran, or none ran at all. (With -k, others are not.)"""
        return script in self.scripts_with_tests or not self.scripts_with_tests

    def write_what_ran(self, reporter):
        """Write how many tests the grades rest on, if these are not all."""
        if self.n_too_late:
            self.write_too_late(reporter)
        n_all = self.n_tests + self.n_left_out
        if self.keyword and self.n_left_out and not self.n_too_late:
            if self.n_tests == 0:
                if not any(self.problems.values()):  # or else its tests may be among those unread
                    reporter.ensure_newline()
                    reporter.write_line(f"No test matches -k {self.keyword}. python3 "
                                        "tests/tools/exercise.py --list names the tests.")
                return
            match = "matches" if self.n_tests == 1 else "match"
            tests = f"{self.n_tests} of {n_all} tests {match} -k {self.keyword}"
        elif self.n_left_out or self.n_too_late:
            tests = f"{self.n_tests - self.n_too_late} of {n_all} tests ran"
        elif self.tests_were_named:
            tests = f"Only the {self.n_tests} tests that you named ran"
        else:
            return
        text = f"{tests}: what is right so far may fail in the others. In the end, run them all."
        reporter.ensure_newline()
        reporter.write_line(wrapped(text))

    def write_too_late(self, reporter):
        """Write that tests were left out, and which technique has taken the most time."""
        key = max(self.own_seconds, key=self.own_seconds.get)
        are = "is" if self.n_too_late == 1 else "are"
        text = (f"{self.n_too_late} of the tests {are} left out, because the others took more than "
                f"{LONGEST_GRADE} seconds: {self.own_seconds[key]:.0f} of them in your {key[1]}.")
        reporter.ensure_newline()
        reporter.write_line(wrapped(text))

    def write_grades(self, script, reporter):
        """Write the grades of one script."""
        shown = f"{self.shown_folder / script}.py"
        if self.problems[script]:
            reporter.section(f"{script}: not graded")
            problem = self.problems[script]
            between = " " if problem.startswith("line ") else ": "
            reporter.write_line(f"{shown}{between}{problem}", red=True)
            return
        grades = [grade for grade in self.grades.values() if grade.script == script]
        n_done = sum(grade.word() == "done" for grade in grades)
        done = "right so far" if self.is_partial() else "done"
        reporter.section(f"{script}: {n_done} of {len(grades)} {done}")
        for grade in grades:
            if grade.word() in ("done", "wrong", "too slow") or grade.state == "missing":
                self.write_grade(grade, reporter)
        untested = [grade.name for grade in grades if grade.word() == "no test"]
        them = "it" if len(untested) == 1 else "them"
        write_names("no test", untested, f" (written, but no test that ran calls {them})", reporter)
        unwritten = [grade.name for grade in grades if grade.state == "not written"]
        write_names("not yet", unwritten, "", reporter)
        self.write_next(script, grades, reporter)

    def write_grade(self, grade, reporter):
        """Write the lines of one grade."""
        word = grade.word()
        first, *others = grade.lines()
        is_open = word == "done" and grade.state == "written" and self.is_partial()
        shown = "so far" if is_open else word
        reporter.write_line(wrapped(f"{shown:8} {grade.name}: {first}", INDENT),
                            green=word == "done", red=word in ("wrong", "too slow"))
        for line in others:
            reporter.write_line(INDENT + line)

    def write_next(self, script, grades, reporter):
        """Write what to do next: what is wrong, or else the first that is not written."""
        for word, verb in (("wrong", "mend"), ("too slow", "speed up"), ("not yet", "write")):
            for grade in grades:
                if grade.word() == word:
                    where = f"{self.shown_folder / script}.py line {grade.line}"
                    reporter.write_line(f"Next: {verb} {grade.name}, {where}.", bold=True)
                    return
        if not grades:
            command = f"python3 tests/tools/exercise.py {script}.NAME {self.shown_folder}"
            reporter.write_line("Every technique is the original's own. Take one out with:\n"
                                f"    {command}")

    def write_broken_tests(self, reporter):
        """Write that tests fail whatever the techniques are, and what may be the reason."""
        reporter.section("tests that fail with the original's techniques, too")
        simplest = min(self.broken_tests, key=lambda failure: (len(failure.test), failure.test))
        n_tests = len(self.broken_tests)
        are = "test is" if n_tests == 1 else "tests are"
        reporter.write_line(wrapped(f"{n_tests} {are} not counted, such as {simplest.test}:"))
        for line in simplest.message:
            reporter.write_line(INDENT + line)
        for script in self.scripts:
            if self.problems[script]:
                continue
            names = other_changes(read(self.path(script)), source_of(script))
            if names:
                reporter.write_line(f"What else differs in {self.shown_folder / script}.py from "
                                    f"the original: {', '.join(names)}.")


def write_names(word, names, ending, reporter):
    """Write the names of techniques that have the same grade, if there are any."""
    if names:
        text = f"{word:8} {', '.join(names)}{ending}"
        reporter.write_line(wrapped(text, INDENT))


def wrapped(text, indent=""):
    """Return a text with line breaks between words. indent: of all lines but the first."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


# ---------------------------------------------------------------------- reading and repeating

def defined_in(module, technique):
    """Return the original's function of a technique, as if it stood in the learner's module.

    It is defined inside a function whose argument is the class, because super() looks for its class
    under the name __class__ around the method; and under a name that it does not use itself.
    """
    owner = technique.name.rpartition(".")[0]
    around = ast.parse("def make(__class__):\n    return the_technique").body[0]
    node = copy.copy(technique.node)
    node.name = "the_technique"
    around.body.insert(0, node)
    tree = ast.fix_missing_locations(ast.Module([around], []))
    found = {}
    exec(compiled(tree, str(ROOT / f"{module.__name__}.py")), vars(module), found)
    value = found["make"](getattr(module, owner, None) if owner else None)
    return value.fget if is_property(technique.node) else value


def line_for(name, source, original):
    """Return the line of a learner's file where a function or method that is missing belongs.

    It is the line below the nearest definition that stands above it in the original and is still
    in the learner's file, or line 1 if there is none.
    """
    still_there = last_lines(source)
    above = itertools.takewhile(lambda other: other != name, last_lines(original))
    kept = [still_there[other] for other in above if other in still_there]
    return kept[-1] + 1 if kept else 1


def last_lines(source):
    """Return {name or Class.name: its last line} of a script; of a class, that of its docstring."""
    found = {}
    for node in parsed(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node.end_lineno
        elif isinstance(node, ast.ClassDef):
            found[node.name] = node.body[0].end_lineno
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method.end_lineno for method in methods}
    return found


def other_changes(source, original):
    """Return the names of what differs in a learner's source and is no technique."""
    names = {technique.name for technique in techniques(original)}
    before = definitions(original)
    after = definitions(source)
    return [name for name in before if name not in names and before[name] != after.get(name)]


def definitions(source):
    """Return {name: its code} of the functions, methods and constants of a script."""
    tree = parsed(source)
    found = {name: code_of(node) for name, node in functions_of(tree).items()}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.unparse(node)
    return found


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
    except MISTAKES as error:
        return error


class Generator:
    """Stands for the result of a function that yields where the original's returns."""

    __slots__ = ()

    def __repr__(self):
        return "a generator: it yields, and should return"


def attempt_all(function, arguments, options, yields):
    """Return what attempt() does, but the items of a generator in a list.

    yields: whether a generator is right.
    """
    try:
        result = function(*arguments, **options)
        if not inspect.isgenerator(result):
            return result
        return list(itertools.islice(result, MOST_ITEMS)) if yields else Generator()
    except MISTAKES as error:
        return error


def longest_for(seconds):
    """Return how many seconds the learner's code may take where the original's takes seconds."""
    return max(LONGEST, TIMES_AS_LONG * seconds)


@contextmanager
def time_limit(seconds):
    """Raise NeverEnds in the block if this process works longer at it, or waits so long.

    (Not on Windows, which has no SIGALRM.) The seconds of a process are fewer than those of the
    clock on a busy machine. If they are far fewer, the block does not work but waits.
    """
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    start = time.perf_counter()
    start_of_work = time.process_time()

    def stop(*_):
        worked = time.process_time() - start_of_work
        if worked >= 0.95 * seconds or worked < 0.1 * (time.perf_counter() - start):
            raise NeverEnds(f"it takes more than {seconds:.0f} seconds")

    outer_stop = signal.signal(signal.SIGALRM, stop)
    # Again and again, should the time not be up, or the learner's code catch it.
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, OFTEN))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_stop)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, outer, OFTEN)


# ------------------------------------------------------------------------ comparing and showing

def is_opaque(value):
    """Return whether a value cannot be compared: a function, an iterator or a context manager."""
    return (inspect.isroutine(value) or hasattr(value, "__next__")
            or isinstance(value, AbstractContextManager))


def size_of(value):
    """Return how many numbers, texts and the like there are in a value."""
    if isinstance(value, dict):
        value = list(value.items())
    elif hasattr(value, "__dict__"):
        value = list(vars(value).values())
    if isinstance(value, ROWS):
        return 1 + sum(map(size_of, value))
    return 1


def same(a, b):
    """Return whether two results are the same: numbers up to rounding, exceptions by their type.

    The order of a dictionary counts: a pool of blocks is one.
    """
    if isinstance(a, float) or isinstance(b, float):
        return same_number(a, b)
    if isinstance(a, ROWS) and isinstance(b, ROWS):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, MISTAKES) or isinstance(b, MISTAKES):
        return type(a) is type(b)
    if hasattr(a, "__dict__") and hasattr(b, "__dict__"):
        return same(sorted(vars(a).items()), sorted(vars(b).items()))
    return a == b or repr(a) == repr(b)


def same_number(a, b):
    """Return whether two values are numbers that are the same up to rounding, or both NaN."""
    try:
        both_nan = math.isnan(a) and math.isnan(b)
        return both_nan or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    except TypeError:
        return False


def other_kind(a, b):
    """Return the first parts of two results that are the same but of different kinds, or None.

    A list may not do where a tuple is expected, nor a float for an int; but an int for a float.
    """
    if isinstance(a, MISTAKES) or isinstance(b, MISTAKES):
        return None
    if isinstance(b, (int, *ROWS)) and type(a) is not type(b):
        return a, b
    if isinstance(b, ROWS):
        return next(filter(None, map(other_kind, a, b)), None)
    return None


def lines_of_kinds(a, b):
    """Return the lines that show two values of different kinds."""
    return [one_line(f"  yours     {with_kind(a)}"), one_line(f"  expected  {with_kind(b)}")]


def with_kind(value):
    """Return a value as text, and which kind it is."""
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{article} {kind}: {exact(value)}"


def names_of_arguments(function, arguments, options):
    """Return the names of the arguments of a call, in the order of values_of()."""
    names = list(inspect.signature(function).parameters)
    return [*(names[i] if i < len(names) else names[-1] for i in range(len(arguments))), *options]


def difference(learners_call, originals_call, path, before, names):
    """Return the lines that show how two calls differ.

    A call is (result, arguments, options). If the results are the same, the calls differ in what
    they did to an argument; then the first such argument is shown. path: of the learner's script.
    before: (arguments, options) as they were. names: of the arguments.
    """
    if not same(learners_call[0], originals_call[0]):
        return two_lines("", learners_call[0], originals_call[0], path)
    values = zip(values_of(learners_call), values_of(originals_call),
                 values_of((None, *before)), names)
    for a, b, value_before, argument in values:
        if same(a, b):
            continue
        if same(b, value_before):
            return [one_line(f"  yours     changes {argument} to {as_text(a)}"),
                    one_line(f"  expected  leaves {argument} as it is")]
        if hasattr(a, "__dict__") and hasattr(b, "__dict__"):
            name = next((name for name in vars(b)
                         if not same(vars(a).get(name), vars(b)[name])), None)
            if name is not None:
                return two_lines(f"leaves {name} = ", vars(a).get(name), vars(b)[name], path)
        return two_lines("leaves ", a, b, path)
    raise ValueError("the calls do not differ")


def two_lines(verb, a, b, path):
    """Return the lines with the learner's value and the original's, and where they differ first.

    Where they differ is said if the lines would not show it.
    """
    yours = f"{verb}{as_text(a, path)}"
    expected = f"{verb}{as_text(b)}"
    if a is None and not verb and not isinstance(b, MISTAKES):
        yours = "None: is a return missing?"
    elif one_line(" " * 12 + yours) == one_line(" " * 12 + expected):
        where, a, b = first_difference(a, b)
        place = where.removeprefix(", ")
        if verb:  # such as "leaves free_blocks = "
            place = f"{verb.removesuffix(' = ').strip()}, {place}" if place else verb.strip(" =")
        elif place:
            place = f"at {place}"
        before = f"{place}: " if place else ""
        yours = f"{before}{exact(a)}"
        expected = f"{before}{exact(b)}"
    lines = []
    for text, value in ((f"  yours     {yours}", a), (f"  expected  {expected}", b)):
        is_error = isinstance(value, MISTAKES)
        lines += few_lines(text, " " * 12) if is_error else [one_line(text)]
    return lines


def first_difference(a, b):
    """Return (where, the part of a, the part of b) of the first place where two values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if len(a) == len(b) and list(a) != list(b):
            place = next(i for i, (key_a, key_b) in enumerate(zip(a, b)) if key_a != key_b)
            return f", key {place}", list(a)[place], list(b)[place]
        pairs = [(key, a[key], b[key]) for key in a if key in b]
    elif isinstance(a, ROWS) and isinstance(b, ROWS):
        pairs = zip(itertools.count(), a, b)
    elif hasattr(a, "__dict__") and hasattr(b, "__dict__"):
        return first_difference(vars(a), vars(b))
    else:
        return "", a, b
    for key, part_a, part_b in pairs:
        if not same(part_a, part_b):
            where, part_a, part_b = first_difference(part_a, part_b)
            return f"[{key!r}]{where}", part_a, part_b
    return ", length", len(a), len(b)


def exact(value):
    """Return a value as text, a number with all its digits."""
    return repr(value) if isinstance(value, (int, float)) else as_text(value)


def values_of(call):
    """Return the values of all arguments of a call (result, arguments, options)."""
    _, arguments, options = call
    return [*arguments, *options.values()]


class Short(reprlib.Repr):
    """A repr that cuts what is long and gives five digits of a number."""

    def __init__(self):
        super().__init__()
        self.maxlist = 8
        self.maxtuple = 8
        self.maxdict = 8
        self.maxstring = 30
        self.maxlong = 12  # digits: a hash has more
        self.maxbytes = 12
        self.maxother = 60
        self.maxlevel = 4

    def repr_instance(self, x, level):
        if isinstance(x, Counter):  # its __dict__ is empty
            return f"Counter({self.repr_dict(x, level)})"
        if hasattr(x, "__dict__") or hasattr(x, "_asdict"):
            parts = x._asdict() if hasattr(x, "_asdict") else vars(x)
            attributes = [f"{name}={self.repr1(value, level - 1)}" for name, value in parts.items()]
            return f"{type(x).__name__}({', '.join(attributes)})"
        return self.repr_str(repr(x), level) if len(repr(x)) > self.maxother else repr(x)

    def repr_bytes(self, x, level):
        """Return them in hex, as code that makes them."""
        dots = " ..." if len(x) > self.maxbytes else ""
        return f'bytes.fromhex("{x[:self.maxbytes].hex(" ")}{dots}")'

    def repr_dict(self, x, level):
        """Return the items in their own order, which reprlib would sort."""
        if level <= 0 and x:
            return "{...}"
        items = []
        for key, value in itertools.islice(x.items(), self.maxdict):
            items.append(f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}")
        if len(x) > self.maxdict:
            items.append("...")
        return "{" + ", ".join(items) + "}"

    def repr_OrderedDict(self, x, level):  # noqa: N802, reprlib wants this name
        """Return it as code that makes it. Without values, it is a set whose order counts."""
        if set(x.values()) == {None}:
            return f"OrderedDict.fromkeys({self.repr_list(list(x), level)})"
        return f"OrderedDict({self.repr_dict(x, level)})"

    def repr_float(self, x, level):
        return f"{x + 0.0:.5g}"  # 0 for -0.0


def as_text(value, path=None):
    """Return a value as text for the report.

    path: the learner's script, in which the line of an exception is looked up.
    """
    if isinstance(value, MISTAKES):
        words = f": {value}" if str(value) else ""
        return f"{type(value).__name__}{line_in(path, value)}{words}"
    return Short().repr(value)


def whole_text(value):
    """Return a value as text that is not cut, with no-break spaces in the texts in it."""
    whole = Short()
    for name in vars(whole):
        if name.startswith("max"):
            setattr(whole, name, MOST_LINES * WIDTH)
    whole.repr_str = lambda x, level: repr(x).replace(" ", NO_BREAK)
    whole.repr_float = lambda x, level: repr(x) if len(repr(x)) <= 8 else f"{x:.5g}"
    return whole.repr(value)


def one_line(text):
    """Return a text without line breaks, and without its end if it is too long for a line."""
    text = text.replace("\n", " ")
    return text if len(text) <= DETAILS else text[:DETAILS - 4] + " ..."


def few_lines(text, indent="    ", most=MOST_LINES, first=""):
    """Return a text as lines, the first of which and the others are indented like this.

    It is left without its end if it is too long for so many lines.
    """
    return textwrap.wrap(text, DETAILS, max_lines=most, placeholder=" ...", initial_indent=first,
                         subsequent_indent=indent, break_on_hyphens=False)


def line_in(path, error):
    """Return where in the learner's script an error came up, as in " in line 7"."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""


def message_of(error, path):
    """Return an error as a few lines for the report."""
    lines = [line for line in str(error).splitlines() if line.strip()][:5]
    first = lines[0] if lines else ""
    lines[:1] = [f"{type(error).__name__}{line_in(path, error)}: {first}"]
    return [part for line in lines for part in few_lines(line)]


def call_as_lines(name, arguments, options):
    """Return (the lines of a call, whether something is left out of them).

    It is one line, or at least one for each argument. A method's object comes first.
    """
    if size_of([arguments, options]) <= MOST_PARTS:
        lines = lines_of_call(name, arguments, options, whole_text, MOST_LINES)
        if len(lines) <= MOST_LINES:
            return lines, False
    return lines_of_call(name, arguments, options, as_text, 1), True


def lines_of_call(name, arguments, options, text_of, most):
    """Return the lines of a call: at most so many for an argument, three times that for an object.
    """
    lines = []
    if "." in name:
        lines = few_lines(f"self = {text_of(arguments[0])}", most=3 * most)
        arguments = arguments[1:]
        name = f"self.{name.rpartition('.')[2]}"
    texts = [text_of(value) for value in arguments]
    texts += [f"{option}={text_of(value)}" for option, value in options.items()]
    line = f"{name}({', '.join(texts)})"
    if len(line) <= DETAILS:
        lines.append(line)
    else:
        parts = [few_lines(f"{text},", " " * 5, most, first=" " * 4) for text in texts]
        lines += [f"{name}(", *itertools.chain(*parts), ")"]
    return [line.replace(NO_BREAK, " ") for line in lines]
