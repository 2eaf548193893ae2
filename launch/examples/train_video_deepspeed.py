r"""Trains a small video diffusion transformer on bouncing digits with DeepSpeed: a user's script, which shards nothing.

    torchrun --nproc-per-node 1 launch/examples/train_video_deepspeed.py \
        --deepspeed_config configs/deepspeed/video_dsp_zero1.json

On a machine without a GPU, set DS_ACCELERATOR=cpu. Started by `python -m dsp_plugin.launch` instead, the same file and
the same JSON train with every video's tokens spread over the ranks.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

# The data and the model are imported as files that lie beside a user's script would be: importing the model through its
# package would import the package's top too, and switch on what only the launcher or the user should.
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(HERE), str(ROOT / "models"), str(ROOT / "dsp_plugin" / "models")]

from deepspeed_training import History, argument_parser, train  # noqa: E402
from moving_digits import NULL_TOKEN, VOCABULARY, MovingDigits, add_arguments, encode  # noqa: E402
from rectified_flow import RectifiedFlow, RectifiedFlowObjective  # noqa: E402
from video_dit import VideoDiT  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, steps=300, width=96)
    add_arguments(parser, frames=7)
    parser.add_argument("--videos", type=int, default=10_000, help="videos in an epoch")
    parser.add_argument("--depth", type=int, default=3, help="space-time layers")
    parser.add_argument("--samples-out", type=Path, help="write generated frames to this PNG")
    parser.add_argument("--sample-steps", type=int, default=25, help="Euler steps of the sampler")
    parser.add_argument("--guidance", type=float, default=2.5, help="classifier-free guidance of the sampler")
    parser.add_argument("--tensorboard", type=Path, help="write TensorBoard logs to this folder")
    return parser.parse_args()


def generate(engine: Any, args: argparse.Namespace) -> torch.Tensor:
    """One video per digit [10, T, 1, Y, X] on the CPU. All ranks must call it: they may hold parts of the weights."""
    captions = [
        f"{digit} {('right', 'left')[i % 2]} {('down', 'up')[i // 2 % 2]}" for i, digit in enumerate(VOCABULARY[:10])
    ]
    labels = torch.stack([encode(caption) for caption in captions]).to(engine.device)
    engine.eval()
    return (
        RectifiedFlow()
        .sample(
            engine.module.model,
            (len(captions), args.frames, 1, args.canvas, args.canvas),
            labels,
            args.sample_steps,
            generator=torch.Generator().manual_seed(args.seed),
            guidance=args.guidance,
            null_labels=torch.full_like(labels, NULL_TOKEN),
        )
        .cpu()
    )


def save_sheet(videos: torch.Tensor, path: Path) -> None:
    """Writes videos [N, T, 1, Y, X] as a sheet of frames: a row per video, a column per frame."""
    from matplotlib.image import imsave

    bordered = torch.nn.functional.pad(videos[:, :, 0], (0, 1, 0, 1), value=1.0)
    sheet = torch.cat([torch.cat(list(video), dim=1) for video in bordered], dim=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.kron(sheet.numpy(), np.ones((4, 4))), cmap="gray", vmin=-1, vmax=1)


def peak_memory() -> dict[str, int]:
    """This rank's peaks, in bytes: resident memory of the process, and memory of the accelerator (0 on a CPU)."""
    on_device = get_accelerator().device_name() != "cpu"
    return {
        "rank": dist.get_rank(),
        # Linux counts in KiB.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": int(get_accelerator().max_memory_allocated()) if on_device else 0,
    }


def main() -> None:
    """Trains, then writes what was asked for."""
    args = parse_arguments()
    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    model = VideoDiT(
        patch=args.patch,
        width=args.width,
        heads=args.heads,
        depth=args.depth,
        vocabulary=len(VOCABULARY),
        positions=args.positions,
    )
    objective = RectifiedFlowObjective(model)
    engine, _, loader, _ = deepspeed.initialize(
        model=objective,
        model_parameters=objective.parameters(),
        training_data=MovingDigits(args.videos, args.frames, args.canvas, seed=args.seed),
        config=str(args.deepspeed_config),
    )

    writer = None
    if args.tensorboard is not None and dist.get_rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(args.tensorboard))

    def log(history: History) -> None:
        if writer is not None:
            step = len(history.loss)
            writer.add_scalar("train/loss", history.loss[-1], step)
            writer.add_scalar("train/tokens_per_second", history.tokens_per_second()[-1], step)

    patches = (args.canvas // args.patch) ** 2
    history = train(engine, loader, args, args.frames * patches, log)

    memory: list[Any] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(memory, peak_memory())
    videos = generate(engine, args) if args.samples_out is not None else None
    if dist.get_rank() == 0:
        if args.metrics_out is not None:
            rate = history.tokens_per_step * len(history.seconds) / sum(history.seconds)
            history.write(args.metrics_out, tokens_per_second=rate, ranks=memory)
        if videos is not None:
            save_sheet(videos, args.samples_out)
        if writer is not None:
            writer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
