"""Fixtures of the tests of the built package: a wheel of this checkout, and an environment with that wheel."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel's files and nothing else of this checkout.

    Attributes:
        python: the interpreter. It finds the dependencies in the environment that runs the tests.
        site_packages: the folder that the wheel was unpacked to.
    """

    python: Path
    site_packages: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a subprocess: PATH finds this ``python``, and PYTHONPATH and MYPYPATH are unset."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
        return inherited | {"PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout. A test that needs it is skipped if its build backend, hatchling, is not installed."""
    pytest.importorskip("hatchling", reason="hatchling, of the extra dev, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """A new virtual environment with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("installation")
    venv.create(folder, symlinks=True, with_pip=False)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A .pth file adds the folder of the dependencies to sys.path. Python does not read the .pth files inside that
    # folder, so an editable installation of this checkout there has no effect.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    return Installation(folder / "bin" / "python", site_packages)
