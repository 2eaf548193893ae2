"""What `pip install dsp-plugin` gives: every file of ours, and commands that need no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rooms import PACKAGES
from starters import JOBS, ROOT

# Every folder that is packed, and the name that it is packed under.
FOLDERS = {**PACKAGES, "configs": "dsp_plugin.configs"}
NOT_PACKED = ("benchmarks", "tests")
RUNS = sorted(path.name for pattern in ("deepspeed_*.sh", "megatron_*.sh") for path in JOBS.glob(pattern))


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and with what this one has beside the checkout.

    Attributes:
        site: its own site-packages.
        elsewhere: an empty folder to run in.
    """

    python: Path
    site: Path
    elsewhere: Path

    def run(self, *command: str | Path, **settings: str) -> str:
        """What a command prints; it has to exit with 0."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        path = os.pathsep.join([str(self.python.parent), str(Path(sys.executable).parent), kept["PATH"]])
        env = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **settings}
        return run(*command, folder=self.elsewhere, env=env)


def run(*command: str | Path, folder: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that exits with 0."""
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, f"{command}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Every file that belongs into a wheel of the checkout at `root`, and its name there."""
    for folder, package in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            if path.is_file():
                yield path, f"{package.replace('.', '/')}/{path.relative_to(root / folder).as_posix()}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what git ignores; a build leaves folders beside the source."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    for folder in (*FOLDERS, *NOT_PACKED):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns(*ignored))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, root)
    return root


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In a folder of its own: a build leaves files in the copy that nobody packs.
    out = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(copy, tmp_path_factory.mktemp("build") / "source")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-compile", wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    # A line of a path file is put on the path, but path files there are not read: the checkout stays out of reach.
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(ours))
    return Installed(python, site, tmp_path_factory.mktemp("elsewhere"))


def pip(*arguments: str | Path) -> None:
    quiet = ("--quiet", "--no-index", "--disable-pip-version-check")
    before: Sequence[str | Path] = ()
    if arguments[0] == "--python":
        before, arguments = arguments[:2], arguments[2:]
    run(sys.executable, "-m", "pip", *before, arguments[0], *quiet, *arguments[1:], folder=Path(sys.prefix))


def test_the_wheel_has_every_file_of_ours_and_nothing_else(copy: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = {name: path for path, name in sources(copy)}
        assert sorted(expected.keys() - packed) == [], "a folder without __init__.py, or data not in package_data"
        assert sorted(packed - expected.keys()) == []
        assert all(archive.read(name) == path.read_bytes() for name, path in expected.items())


def test_every_module_is_the_installed_one(copy: Path, installed: Installed) -> None:
    paths = [Path(name) for _, name in sources(copy) if name.endswith(".py")]
    modules = [".".join((path.parent if path.stem == "__init__" else path.with_suffix("")).parts) for path in paths]
    ask = (
        "import json, sys\nfrom importlib.util import find_spec\n"
        "print(json.dumps({module: find_spec(module).origin for module in sys.argv[1:]}))"
    )
    found = json.loads(installed.run(installed.python, "-c", ask, *modules))
    assert {module: Path(origin) for module, origin in found.items()} == {
        module: installed.site / path for module, path in zip(modules, paths, strict=True)
    }
    assert "dsp_plugin.launch.examples.train_video_deepspeed" in found


def test_doctor_looks_round(installed: Installed) -> None:
    found = json.loads(installed.run(installed.python.parent / "dsp-plugin", "doctor", "--json"))
    assert found["software"]


def test_the_launcher_explains_itself(installed: Installed) -> None:
    assert "--sp-method" in installed.run(installed.python, "-m", "dsp_plugin.launch", "--help")


@pytest.mark.parametrize("job", RUNS)
def test_a_job_names_files_that_are_there(job: str, installed: Installed) -> None:
    package = installed.site / "dsp_plugin"
    printed = installed.run("bash", package / "launch" / "jobs" / job, DRY_RUN="1").split()
    named = [Path(word) for word in printed if word.startswith(str(package))]
    assert any(path.suffix == ".py" for path in named)
    assert [path for path in named if not path.is_file()] == []
    # What a file of flags says is on the command line; one that is missing leaves it short.
    files = list((package / "configs" / "megatron").glob("*.args"))
    assert job.startswith("deepspeed") or any(set(path.read_text().split()) <= set(printed) for path in files)
