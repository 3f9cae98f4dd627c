"""Find for each technique a test that fails if it is broken, and write the list of them.

    python3 tests/tools/find_tests.py                  all five scripts, in two or three minutes
    python3 tests/tools/find_tests.py microflash       one script
    python3 tests/tools/find_tests.py --check          say which tests of the list do not fail

Each test runs once as it is, to see which techniques it calls. Then it runs with each of these
broken, one at a time: what the technique returns is changed a little, or it does nothing if it
returns nothing. A test that passes all the same is not a test of this technique. Of those that
fail, the list has the one whose name says most of the technique's name; of equals, one that is not
about a finding, and then the one that calls the fewest techniques. The list is
tests/tools/tests_of_techniques.txt, and `python3 tests/tools/exercise.py --list` shows it.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]  # of the project
sys.path.insert(0, str(ROOT))
from tests.tools.exercise import (  # noqa: E402
    NAMES,
    TESTS,
    listed_tests,
    replace_file,
    source_of,
    techniques,
)
from tests.tools.grading import NeverEnds, is_opaque, time_limit  # noqa: E402
from tests.tools.importing import imported  # noqa: E402

LONGEST = 1        # seconds that a test may take with a broken technique, or else it fails, and ...
TIMES_AS_LONG = 3  # ... this many times what it takes as it is
MOST_VARIANTS = 4  # of a test with parameters that are tried


# -------------------------------------------------------------------------------------- breaking

def spoiled(value):
    """Return a value like this one, but with all numbers and texts in it changed a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.01 + 0.01
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, (bytes, bytearray)):
        return bytes(byte ^ 1 for byte in value) or b"?"
    if isinstance(value, dict):
        return {key: spoiled(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple
        return type(value)(*map(spoiled, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(spoiled, value)) or type(value)([0])
    if isinstance(value, (range, set, frozenset)):
        return [spoiled(item) for item in value]
    return spoiled_object(value)


def spoiled_object(value):
    """Return an object like this one, changed a little; a function returns what is changed."""
    if isinstance(value, AbstractContextManager) and is_opaque(value):
        return nullcontext()
    if hasattr(value, "__next__"):
        return (spoiled(item) for item in value)
    if is_opaque(value):
        return lambda *arguments, **options: spoiled(value(*arguments, **options))
    if not hasattr(value, "__dict__"):
        return value
    result = copy.copy(value)
    for name, attribute in vars(value).items():
        vars(result)[name] = spoiled(attribute)
    return result


class Finder:
    """A pytest plugin: runs each test with one technique broken after the other.

    A technique is identified by (script, name), called its key.
    """

    def __init__(self, scripts, only=None):
        self.only = only      # {key: the only test to try}, or None to try them all
        self.found = {}       # key: the rank of the best test so far that fails if it is broken
        self.n_variants = {}  # test: how many have run
        self.called = set()   # keys, in this test
        self.broken = None    # the key of the technique that is broken now
        self.inside = False   # whether the broken technique runs now
        for script in scripts:
            imported(script, ROOT / f"{script}.py", functools.partial(self.followed, script))

    def followed(self, script, name):
        """Return a decorator for a technique: its calls go through self.call."""
        key = script, name

        def decorate(value):
            if isinstance(value, property):
                return property(decorate(value.fget))

            @functools.wraps(value)
            def call(*arguments, **options):
                return self.call(key, value, arguments, options)
            return call
        return decorate

    def call(self, key, function, arguments, options):
        """Call a technique, or break it. A call inside of a broken one is not broken again."""
        self.called.add(key)
        if key != self.broken or self.inside:
            return function(*arguments, **options)
        if function.__annotations__.get("return") == "None":
            return None
        self.inside = True
        try:
            return spoiled(function(*arguments, **options))
        finally:
            self.inside = False

    def pytest_collection_modifyitems(self, items):
        """Leave out the tests that are not to be tried with any technique."""
        if self.only is not None:
            items[:] = [item for item in items if item.originalname in self.only.values()]

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """Run a test as it is, and with each technique that it calls broken."""
        names = pyfuncitem._fixtureinfo.argnames
        fixtures = {name: pyfuncitem.funcargs[name] for name in names}
        test = pyfuncitem.originalname
        self.n_variants[test] = self.n_variants.get(test, 0) + 1
        is_one_more = self.n_variants[test] > MOST_VARIANTS
        if is_one_more and self.only is None:
            return True

        self.called = set()
        self.broken = None
        start = time.perf_counter()
        pyfuncitem.obj(**fixtures)
        longest = LONGEST + TIMES_AS_LONG * (time.perf_counter() - start)
        called = self.called
        for key in sorted(called):
            rank = rank_of(key[1], test, len(called), list(self.n_variants).index(test))
            is_better = key not in self.found or rank < self.found[key]
            if is_better and self.is_wanted(key, test):
                self.broken = key
                if fails(pyfuncitem.obj, fixtures, longest):
                    self.found[key] = rank
        self.broken = None
        return True

    def is_wanted(self, key, test):
        """Return whether a test is to be tried with this technique."""
        return self.only is None or self.only.get(key) == test


def fails(test, fixtures, longest):
    """Return whether a test fails now, or takes longer than so many seconds."""
    for name in {"capsys", "capfd"} & fixtures.keys():
        fixtures[name].readouterr()
    try:
        with time_limit(longest):
            test(**fixtures)
    except (Exception, NeverEnds):
        return True
    return False


# -------------------------------------------------------------------------------------- choosing

def words_of(name):
    """Return the words of a name with more than two letters: KVCache.update -> cache, update."""
    apart = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3 \2\4", name)
    return [word for word in re.split(r"[ ._]+", apart.lower()) if len(word) > 2]


def rank_of(technique, test, n_called, place):
    """Return how well a test suits a technique, as a tuple; the smallest is best.

    n_called: how many techniques the test calls. place: of the test in its file, where simple ones
    come first. The last item is the test itself.
    """
    n_words = sum(word in test for word in words_of(technique))
    is_finding = test.startswith("test_finding_")  # about an experiment
    return -n_words, is_finding, n_called, place, test


def run(scripts, only=None):
    """Run the tests of some scripts with each technique broken. Return {key: its best test}."""
    finder = Finder(scripts, only)
    files = [str(ROOT / "tests" / f"test_{script}.py") for script in scripts]
    status = pytest.main(["-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-n", "0",
                          "--no-header", "--assert=plain", *files], plugins=[finder])
    if status:
        sys.exit("find_tests.py: these tests must pass first")
    return {key: rank[-1] for key, rank in finder.found.items()}


def find(scripts):
    """Write the list, with the tests of some scripts found anew."""
    found = run(scripts)
    known = listed_tests()
    lines = []
    for script in NAMES:
        for technique in techniques(source_of(script)):
            name = f"{script}.{technique.name}"
            if script in scripts:
                test = found.get((script, technique.name))
            else:
                test = known.get(name)
            if test is None and script in scripts:
                print(f"no test of {script} fails if {technique.name} is broken")
            elif test is not None:
                lines.append(f"{name:<46}  {test}\n")
    replace_file(TESTS, "".join(lines))


def check(scripts):
    """Print which entries of the list are missing or wrong. Return the exit status."""
    known = listed_tests()
    only = {}
    for script in scripts:
        for technique in techniques(source_of(script)):
            only[script, technique.name] = known.get(f"{script}.{technique.name}")
    found = run(scripts, only)
    wrong = [key for key in only if not found.get(key)]
    for script, name in wrong:
        print(f"{script}.{name}: {only[script, name]} does not fail if it is broken; "
              f"run python3 tests/tools/find_tests.py {script}")
    return 1 if wrong else 0


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help="default: all five")
    parser.add_argument("--check", action="store_true", help="only check the list")
    arguments = parser.parse_args()
    scripts = arguments.scripts or NAMES
    if not set(scripts) <= set(NAMES):
        parser.error(f"the scripts are {', '.join(NAMES)}")
    if arguments.check:
        return check(scripts)
    find(scripts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
