"""pytest learns the option --impl here, as it must stand beside pyproject.toml for that; tests/grading.py is what it does."""

pytest_plugins = ["tests.grading"]
