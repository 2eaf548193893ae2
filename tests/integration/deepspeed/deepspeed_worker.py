"""One rank of a world that runs many cases one after the other: starting DeepSpeed costs more than training does.

    deepspeed_worker.py FOLDER GROUP...

Results are written to FOLDER as ``CASE.rankR.json`` (and ``CASE.pt`` with gradients by rank 0). An exception that a
case does not expect ends the rank, so the test sees this case's traceback and no result of the later ones.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from deepspeed_cases import Case, parameters_optimizer, parity_cases
from linear_cases import linear_cases
from matrix_cases import matrix_cases

# The only line that a user adds, here where sorted imports put it.
import dsp_plugin
from dsp_plugin.kernels import calls

TRAINED = {
    "parity": parity_cases,
    "linear": linear_cases,
    "covering": lambda world: matrix_cases(everything=False),
    "matrix": lambda world: matrix_cases(everything=True),
}


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The case under DeepSpeed, by the calls of a user's script."""
    name = case.name
    # Peers seed differently: that they hold one model is then DeepSpeed's and our doing, not the seed's.
    torch.manual_seed(dist.get_rank() % case.size)
    model = case.build()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=parameters_optimizer(case, model.parameters()), config=case.config()
    )
    losses, local, norms = [], [], []
    gradients: dict[str, torch.Tensor | None] = {}
    for step in range(case.steps):
        total, replica = 0.0, engine.sequence_parallel_groups.dp.rank
        for micro in range(case.accumulation):
            with dsp_plugin.ledger() as log:
                loss = case.loss(engine, case.batch(step, micro, replica))
                with calls() as made:
                    engine.backward(loss)
            sent, again = case.sent(log), made.forward
            if step == 0 and micro == case.accumulation - 1:
                found = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
                gradients = {name: None if g is None else g.detach().float().clone() for name, g in found.items()}
            engine.step()
            total += loss.item() / case.accumulation
        local.append(total)
        losses.append(mean_over_ranks(total))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
        if step == 0 and (case.reload or case.regrouped() != case):
            path = folder / f"{case.name}.checkpoint"
            case = case.regrouped()
            engine = reloaded(case, engine, path)
            model = engine.module
    # What an engine asked of checkpointing ends with it.
    engine.destroy()
    if dist.get_rank() == 0:
        torch.save(gradients, folder / f"{name}.pt")
    return {
        "losses": losses,
        "local": local,
        "norms": norms,
        "samples": engine.global_samples,
        "sent": sent,
        "again": again,
    }


def reloaded(case: Case, engine: Any, folder: Path) -> Any:
    """Saves, and goes on with a new engine whose weights came from elsewhere and are then loaded."""
    engine.save_checkpoint(str(folder))
    config = case.config()
    if case.universal:
        if dist.get_rank() == 0:
            convert(folder)
        dist.barrier()
        config["checkpoint"] = {"load_universal": True}
    torch.manual_seed(99)
    model = case.build()
    fresh, *_ = deepspeed.initialize(
        model=model, optimizer=parameters_optimizer(case, model.parameters()), config=config
    )
    path, _ = fresh.load_checkpoint(str(folder))
    assert path is not None
    return fresh


def convert(folder: Path) -> None:
    """Converts the latest checkpoint by the command that DeepSpeed documents."""
    latest = folder / (folder / "latest").read_text()
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    files = ["--input_folder", str(latest), "--output_folder", f"{latest}_universal", "--inject_missing_state"]
    done = subprocess.run([sys.executable, *command, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def mean_over_ranks(value: float) -> float:
    """The mean over the world, in fp64."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def main() -> None:
    """Runs the groups of cases in order."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    world = dist.get_world_size()
    for group in sys.argv[2:]:
        if group in TRAINED:
            runs = {case.name: (lambda case=case: train(case, folder)) for case in TRAINED[group](world)}
        else:
            runs = importlib.import_module(group).runs(folder)
        for name, run in runs.items():
            print(f"case {name}", flush=True)
            try:
                result = run()
            except BaseException:
                record(folder, name, {"failed": traceback.format_exc()})
                raise
            record(folder, name, result)
    dist.barrier()
    dist.destroy_process_group()


def record(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Writes this rank's result of a case."""
    (folder / f"{name}.rank{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
