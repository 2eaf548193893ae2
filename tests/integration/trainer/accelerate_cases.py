"""Training loops on accelerate, as its own examples write them: none knows of sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from torch.utils.data import DataLoader
from trainer_cases import LONGEST, Stream, Text, build_model, to_longest

STEPS = 8


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Attributes:
        wrapper: "ddp" or "fsdp2", without DeepSpeed; None for ZeRO.
        stage: of ZeRO.
        split_batches, dispatch_batches, streamed: how data are read.
    """

    wrapper: str | None = None
    stage: int = 1
    split_batches: bool = False
    dispatch_batches: bool | None = None
    streamed: bool = False

    def run(self, folder: Path, section: dict[str, Any] | None) -> dict[str, Any]:
        """Trains half, stops, goes on with everything made anew, and evaluates."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = self._train(folder, section, stop=None)
        if self.wrapper == "fsdp2":
            # What accelerate saves of it cannot be read on CPUs, with a section or without.
            return {**whole, "unbroken": whole["losses"]}
        broken = self._train(folder, section, stop=STEPS // 2)
        went_on = self._train(folder, section, stop=None, resume=True)
        broken["losses"] += went_on.pop("losses")
        return {**whole, "unbroken": whole["losses"], "losses": broken["losses"], "on": went_on}

    def _train(
        self, folder: Path, section: dict[str, Any] | None, stop: int | None, resume: bool = False
    ) -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = self._accelerator(section)
        set_seed(5)
        model = build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        data = Stream(32, 0) if self.streamed else Text(32, 0)
        # Half as many replicas take as many samples at a time, where a batch is what they take together.
        size = 4 if self.split_batches else 2
        loader = DataLoader(data, batch_size=size, shuffle=not self.streamed, collate_fn=to_longest)
        held_out = DataLoader(Text(7, 5), batch_size=size, collate_fn=to_longest)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer, loader, held_out, schedule = accelerator.prepare(model, optimizer, loader, held_out, schedule)
        place = folder / "state"
        done = 0
        if resume:
            accelerator.load_state(str(place))
            done = STEPS // 2
            loader = accelerator.skip_first_batches(loader, done)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            done += 1
            if stop is not None and done == stop:
                accelerator.save_state(str(place))
                return {"losses": losses}
            if done == STEPS:
                break
        return {"losses": losses, "rate": schedule.get_last_lr(), **self._evaluate(accelerator, model, held_out)}

    def _accelerator(self, section: dict[str, Any] | None) -> Accelerator:
        more: dict[str, Any] = {
            "gradient_accumulation_steps": 2,
            "dataloader_config": DataLoaderConfiguration(
                split_batches=self.split_batches, dispatch_batches=self.dispatch_batches
            ),
        }
        if self.wrapper is None:
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": "auto",
                "train_batch_size": "auto",
                "gradient_accumulation_steps": 2,
                "zero_optimization": {"stage": self.stage},
            }
            if section is not None:
                config["sequence_parallel"] = section
            return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), **more)
        accelerator = Accelerator(cpu=True, **more)
        if self.wrapper == "fsdp2":
            # accelerate gives FSDP to accelerators alone, though all that it does works on CPUs.
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                cpu_ram_efficient_loading=False,
            )
        return accelerator

    def _evaluate(self, accelerator: Accelerator, model: Any, held_out: DataLoader) -> dict[str, Any]:
        model.eval()
        predicted, labelled = [], []
        for batch in held_out:
            with torch.no_grad():
                logits = model(**batch).logits
            assert logits.shape[:2] == (len(batch["labels"]), LONGEST)
            # What stands where the padding is means nothing.
            sums = torch.where(batch["labels"] == -100, 0.0, logits.sum(-1))
            sums, labels = accelerator.gather_for_metrics((sums, batch["labels"]))
            predicted += sums.tolist()
            labelled += labels.tolist()
        names = [None]
        if accelerator.process_index == 0:
            names = ["from the first"]
        with accelerator.split_between_processes(list(range(7))) as mine:
            shared = gather_object(list(mine))
        ends = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device))
        return {
            "predicted": predicted,
            "labelled": labelled,
            "processes": accelerator.num_processes,
            "numbers": ends.tolist(),
            "shared": shared,
            "told": broadcast_object_list(names),
            "summed": accelerator.reduce(torch.tensor([2.0], device=accelerator.device), reduction="sum").tolist(),
            "writers": _writers(accelerator),
        }


def _writers(accelerator: Accelerator) -> int:
    """How many ranks of the world take themselves for the main process."""
    mine = torch.tensor([float(accelerator.is_main_process)])
    torch.distributed.all_reduce(mine)
    return int(mine)


LOOPS = {
    "loop": Loop(),
    "loop_split": Loop(stage=2, split_batches=True),
    "loop_dispatched": Loop(stage=3, dispatch_batches=True, streamed=True),
}
"""By name; each is run with and without a section."""
WRAPPED_LOOPS = {
    "loop_ddp": Loop("ddp"),
    "loop_ddp_split": Loop("ddp", split_batches=True),
    "loop_fsdp2": Loop("fsdp2", dispatch_batches=True, streamed=True),
}
"""By name; each is run with and without a section that the run is told."""
COVERING_LOOPS = ("loop_dispatched",)
COVERING_WRAPPED_LOOPS = ("loop_fsdp2",)
