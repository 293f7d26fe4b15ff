import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def lower_bounds(requirements):
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", text.lower().replace("_", "-")) for text in requirements]
    return {match[1]: match[2] for match in found}


def test_the_oldest_versions_that_are_tested_are_the_ones_that_are_allowed():
    assert pinned("constraints-oldest.txt") == lower_bounds(PROJECT["dependencies"])


def test_every_dependency_has_the_exact_version_that_the_tests_pass_with():
    versions = pinned("constraints.txt")
    extras = PROJECT["optional-dependencies"]
    bounds = lower_bounds([*PROJECT["dependencies"], *extras["test"], *extras["optimizers"], *extras["trainers"]])
    for name, bound in bounds.items():
        assert as_numbers(versions[name]) >= as_numbers(bound), name


def as_numbers(version):
    return [int(part) for part in version.split(".")]
