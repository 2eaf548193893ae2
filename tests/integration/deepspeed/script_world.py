"""Worlds that run scripts one after the other, for starting ranks costs more than small scripts do."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed_world import run_ranks


class ScriptWorld:
    """What scripts came to on some ranks.

    Args:
        command: of one rank, for python.
        folder: where it leaves what each script came to, as ``NAME.rankR.json``.
        timeout: seconds until it counts as hung.
    """

    def __init__(self, command: Sequence[str], ranks: int, folder: Path, timeout: float) -> None:
        self.ranks, self.folder = ranks, folder
        self.failure: AssertionError | None = None
        try:
            run_ranks(command, ranks, folder, timeout)
        except AssertionError as failure:
            self.failure = failure

    def results(self, name: str) -> list[dict[str, Any]]:
        """By rank."""
        paths = [self.folder / f"{name}.rank{rank}.json" for rank in range(self.ranks)]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        failed = [result["failed"] for result in found if "failed" in result]
        assert not failed, failed[0]
        assert len(found) == self.ranks, f"{self.ranks - len(found)} ranks never ended {name}:\n{self.failure}"
        return found


def run_scripts(names: Iterable[str], folder: Path, run: Callable[[str], dict[str, Any]]) -> None:
    """On one rank; what a script raises ends the rank, for the others wait for it in vain."""
    for name in names:
        print(f"case {name}", flush=True)
        failed = None
        try:
            result = run(name)
        except BaseException:
            failed = traceback.format_exc()
            result = {"failed": failed}
        rank = dist.get_rank() if dist.is_initialized() else 0
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(result))
        assert failed is None, failed
    dist.barrier()
    dist.destroy_process_group()


def deepspeed_config(stage: int | None, section: dict[str, Any] | None) -> dict[str, Any]:
    """As a script for Transformers' Trainer has it in its JSON.

    Args:
        stage: of ZeRO.
        section: of ours, if it has one.
    """
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    return config if section is None else {**config, "sequence_parallel": section}
