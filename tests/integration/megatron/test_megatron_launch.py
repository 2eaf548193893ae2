"""The Megatron jobs in launch/jobs/, started in each way that there is, train as one rank does.

Where the wheel has `megatron.training` (0.17 on) they run its `pretrain`, else the script that needs the core alone.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from cores import NEWEST, OLDEST, has
from megatron_runs import torchrun
from starters import EXAMPLES, JOBS, ROOT, environment, free_port, shell

pytestmark = pytest.mark.timeout(400)

CONFIGS = ROOT / "configs" / "megatron"
GPT = ("pretrain_gpt.py", "") if has("megatron.training") else ("pretrain_gpt_core.py", "_core")
# The script of each job, and the file with the flags of a small model.
MODELS = {
    "megatron_gpt_usp.sh": (GPT[0], f"gpt{GPT[1]}_tiny_cpu.args"),
    "megatron_hybrid_lasp.sh": (GPT[0], f"hybrid{GPT[1]}_tiny_cpu.args"),
    "megatron_video_dsp.sh": ("pretrain_video_core.py", "video_core_tiny_cpu.args"),
}


def losses(output: str) -> list[float]:
    """What a run logged: one rank does, after each step."""
    return [float(loss) for loss in re.findall(r"\bloss:? (\d\S*)", output)]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], list[float]]:
    """Losses of a job's model on one rank without the plugin's flags."""

    @cache
    def run(job: str) -> list[float]:
        script, flags = EXAMPLES / MODELS[job][0], (CONFIGS / MODELS[job][1]).read_text().split()
        return losses(torchrun(1, "-m", "dsp_plugin.launch", "--cpu", str(script), *flags, timeout=200).stdout)

    return run


def on_this_node(job: str, folder: Path, **sizes: str) -> str:
    return shell(str(JOBS / job), env=environment(folder, GPUS="2", **sizes))


def by_rendezvous(job: str, folder: Path, **sizes: str) -> str:
    """As somebody does who logs in to both nodes."""
    env = environment(folder, RDZV=f"localhost:{free_port()}", NNODES="2", GPUS="1", **sizes)
    return shell(str(JOBS / "elastic.sh"), str(JOBS / job), env=env, copies=2)


def on_slurm(job: str, folder: Path, **sizes: str) -> str:
    """What sbatch would run on the first node of an allocation."""
    allocation = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_JOB_ID": "7"}
    env = environment(folder, MASTER_PORT=str(free_port()), GPUS="1", **allocation, **sizes)
    return shell(str(JOBS / "slurm.sbatch"), str(JOBS / job), env=env)


def by_hostfile(job: str, folder: Path, **sizes: str) -> str:
    hosts = folder / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    env = environment(folder, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **sizes)
    return shell(str(JOBS / "hostfile.sh"), str(hosts), str(JOBS / job), env=env)


COVERING = {
    ("megatron_gpt_usp.sh", on_slurm): NEWEST,
    ("megatron_hybrid_lasp.sh", by_rendezvous): OLDEST,
}
STARTS = (on_this_node, by_rendezvous, on_slurm, by_hostfile)


@pytest.mark.parametrize(
    ("job", "start"),
    [
        pytest.param(
            job,
            start,
            id=f"{job}-{start.__name__}",
            marks=COVERING.get((job, start), pytest.mark.matrix),
        )
        for job in MODELS
        for start in STARTS
    ],
)
def test_job_trains_as_one_rank_does(
    job: str, start: Callable[..., str], alone: Callable[[str], list[float]], tmp_path: Path
) -> None:
    if start is by_hostfile:
        pytest.importorskip("deepspeed")
    script, flags = EXAMPLES / MODELS[job][0], CONFIGS / MODELS[job][1]
    output = start(job, tmp_path, TP="1", CP="2", SCRIPT=str(script), ARGUMENTS=str(flags))
    (line,) = re.findall(r"dsp_plugin \d\S* \| .*", output)
    assert f"| {job.removesuffix('.sh').rpartition('_')[2]} over 2 ranks " in line
    found = losses(output)
    assert len(found) == 3
    assert found[-1] < found[0]
    assert found == pytest.approx(alone(job), rel=1e-6)


@pytest.mark.parametrize("job", MODELS)
def test_dry_run_prints_what_srun_would_run(job: str, tmp_path: Path) -> None:
    env = environment(tmp_path, DRY_RUN="1", SLURM_JOB_ID="7", TP="2", CP="8")
    done = subprocess.run(
        ["bash", str(JOBS / "slurm.sbatch"), str(JOBS / job), "--train-iters", "5"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    expected = (
        "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint localhost:20007 "
        f"--rdzv-id 7 -m dsp_plugin.launch {EXAMPLES}/pretrain_"
    )
    assert done.stdout.startswith(expected)
    assert "--tensor-model-parallel-size 2 --sequence-parallel" in done.stdout
    assert done.stdout.endswith("--train-iters 5\n")


@OLDEST
def test_checkout_beside_the_script_is_used(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import megatron.core\nprint(megatron.core.__file__, megatron.core.__version__)\n")
    installed = importlib.util.find_spec("megatron.core")
    assert installed is not None
    assert installed.origin is not None
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    # The installed package under another version: what is looked up in it is found there.
    package = f"__path__ = [{str(Path(installed.origin).parent)!r}]\n__version__ = "
    start = [sys.executable, "-m", "dsp_plugin.launch", "--sp-method", "ulysses", str(script)]
    run = partial(subprocess.run, start, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    core.joinpath("__init__.py").write_text(package + "'0.17.5'\n")
    done = run(timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{core / '__init__.py'} 0.17.5"

    core.joinpath("__init__.py").write_text(package + "'0.99.1'\n")
    refused = run(timeout=120)
    assert refused.returncode == 2
    assert "megatron-core 0.99.1 is not supported" in refused.stderr
