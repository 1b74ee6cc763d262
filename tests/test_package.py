"""What a user installs: the wheel, and the commands of the README."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("onp", "envs", "agents", "baselines_rnp")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built offline in a copy of the tree."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    script = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("onp-*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (entry for entry in wheel.namelist() if re.fullmatch(rf"onp-[^/]+\.dist-info/{name}", entry))
    return wheel.read(path).decode()


def test_the_wheel_holds_the_packages_and_no_tests(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {"onp/models/wide_resnet.py", "onp/attacks/__main__.py"} <= sources
    assert {name for name in names if name.endswith(".py")} == sources
    assert names >= {f"{package}/py.typed" for package in PACKAGES}
    assert names >= {"onp/templates/detect.html", "baselines_rnp/calibration.json"}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    text = metadata(wheel, "METADATA")
    headers, _, readme = text.partition("\n\n")
    assert "\nName: onp\n" in headers and "\nLicense-Expression: MIT\n" in headers
    assert "\nRequires-Dist: stable-baselines3>=" in headers
    assert readme.strip() == (ROOT / "README.md").read_text().strip()
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_environment_is_registered_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Importing `envs` registers it."""
    wheel.extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import envs, gymnasium; "
        "print(envs.__file__, gymnasium.spec('onp/NeuronPruning-v0').entry_point)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == [str(tmp_path / "envs" / "__init__.py"), "envs.pruning:PruningEnv"], done.stderr


def test_no_public_name_is_hidden_by_a_module() -> None:
    """In a process of its own, since a module takes its name in the package when it is first imported."""
    script = "import onp; print(*(type(getattr(onp, name)).__name__ for _ in range(2) for name in onp.__all__))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert set(done.stdout.split()) == {"function", "type"}, done.stdout + done.stderr


def test_continuous_integration_finds_the_test_command() -> None:
    """The very line of `.ci/run` that reads the README, run in bash."""
    (line,) = re.findall(r"^command=.*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{line}\nprintf "%s" "$command"'],
        cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout and "pytest" in done.stdout
    assert "```" not in done.stdout and "<!--" not in done.stdout
