"""The job of the video transformer under DeepSpeed, started in each way that there is, trains as on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starters import JOBS, ROOT, environment, free_port, shell

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(400)]

JOB = str(JOBS / "deepspeed_video_dsp.sh")
SMALL = ["--steps", "2", "--videos", "64", "--width", "24", "--heads", "2", "--depth", "1"]
# What the CPU accelerator of DeepSpeed takes for the number of devices; its own launcher sets it by itself.
ONE_RANK = {"LOCAL_SIZE": "1", "GPUS": "1"}
TWO_NODES = {**ONE_RANK, "NNODES": "2"}


def losses(folder: Path, *start: str, copies: int = 1, config: Path | None = None, **settings: str) -> list[float]:
    """What the job logs when it is started so."""
    metrics = folder / "metrics.json"
    if config is not None:
        settings["CONFIG"] = str(config)
    env = environment(folder, **settings)
    shell(*start, JOB, *SMALL, "--metrics-out", str(metrics), env=env, copies=copies)
    return json.loads(metrics.read_text())["losses"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one rank, without the section of the config that shards."""
    folder = tmp_path_factory.mktemp("alone")
    settings = json.loads((ROOT / "configs" / "deepspeed" / "video_dsp_zero2.json").read_text())
    del settings["sequence_parallel"]
    config = folder / "config.json"
    config.write_text(json.dumps(settings))
    return losses(folder, config=config, **ONE_RANK)


@pytest.mark.matrix
def test_on_this_node(alone: list[float], tmp_path: Path) -> None:
    found = losses(tmp_path, LOCAL_SIZE="2", GPUS="2")
    assert len(found) == 2
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.matrix
def test_hostfile_and_pdsh(alone: list[float], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = losses(tmp_path, str(JOBS / "hostfile.sh"), str(hosts), **place)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.matrix
def test_rendezvous(alone: list[float], tmp_path: Path) -> None:
    place = {"RDZV": f"localhost:{free_port()}", **TWO_NODES}
    found = losses(tmp_path, str(JOBS / "elastic.sh"), copies=2, **place)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.matrix
def test_slurm(alone: list[float], tmp_path: Path) -> None:
    place = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_JOB_ID": "7"}
    found = losses(tmp_path, str(JOBS / "slurm.sbatch"), MASTER_PORT=str(free_port()), **place, **ONE_RANK)
    assert found == pytest.approx(alone, rel=1e-5)
