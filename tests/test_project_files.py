"""Files for people and services around the code agree with it: versions, workflow, citation, issue forms."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

import adapter_compiler as ac
from tests.source_files import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read_yaml(name: str) -> dict[str, Any]:
    found = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def read_jobs() -> dict[str, Any]:
    jobs: dict[str, Any] = read_yaml(".github/workflows/ci.yml")["jobs"]
    return jobs


def test_the_citation_is_of_this_version() -> None:
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == ac.__version__
    assert f'license = "{citation["license"]}"' in PYPROJECT


def test_the_version_is_written_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", ac.__version__)
    assert 'path = "adapter_compiler/__init__.py"' in PYPROJECT
    assert not re.search(r"^version\s*=", PYPROJECT, flags=re.MULTILINE)


def test_the_workflow_tries_every_python_and_the_ends_of_the_range_of_torch() -> None:
    matrix = read_jobs()["versions"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert f'requires-python = ">={matrix["python"][0]}"' in PYPROJECT
    (pinned,) = matrix["torch"]
    assert f"TORCH:={pinned}" in (ROOT / "run").read_text(encoding="utf-8")
    lowest, below = re.findall(r'"torch>=([\d.]+),<(\d+)"', PYPROJECT)[0]
    tried = [pinned, *(entry["torch"] for entry in matrix["include"])]
    assert f"torch=={lowest}.0" in tried and f"torch<{below}" in tried


def test_the_workflow_runs_what_ci_run_knows() -> None:
    commands = [step["run"] for job in read_jobs().values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    known = set(re.findall(r"^#   (\w+) ", (ROOT / ".ci/run").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for command in commands:
        program, *parts = command.split()
        assert program == "./run" or set(parts) <= known, command


def test_an_unknown_part_is_refused() -> None:
    done = subprocess.run([ROOT / ".ci/run", "test"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    parts = "tests, lint, docs, package, examples, integrations, web or slow"
    assert done.stderr == f"unknown part: test, expected {parts}\n"


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_an_issue_form_asks_for_something(name: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    assert all(part["id"] and part["attributes"]["label"] for part in form["body"])
    assert any(part.get("validations", {}).get("required") for part in form["body"])
