"""Videos of bouncing handwritten digits, made from scikit-learn's bundled scans, each with a caption.

Every item is a function of (seed, index) alone, diffusion time and noise included: whichever process asks for an item,
and in whatever order, it sees the same numbers.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("left", "right", "up", "down"),
)
NULL_TOKEN = len(VOCABULARY)


def add_arguments(parser: argparse.ArgumentParser, *, frames: int) -> None:
    """What scripts that train on these videos ask for; `frames` is the default of theirs."""
    parser.add_argument("--frames", type=int, default=frames)
    parser.add_argument("--canvas", type=int, default=20, help="side of a frame, in pixels")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch, in pixels")
    parser.add_argument("--positions", choices=("rotary", "sinusoidal"), default="rotary")


def encode(caption: str) -> Tensor:
    """Token ids [words] of a caption such as "seven left up"."""
    return torch.tensor([VOCABULARY.index(word) for word in caption.split()])


def bounce(start: int, speed: int, frames: int, room: int) -> np.ndarray:
    """Positions [frames] in 0..room of a point that is reflected at both ends."""
    period = 2 * room
    position = (start + speed * np.arange(frames)) % period
    return np.minimum(position, period - position)


class MovingDigits(Dataset[dict[str, Tensor]]):
    """`length` videos of one or more bouncing digits.

    Args:
        length: number of videos; they are drawn, not stored, so any number is free.
        frames: frames per video, T.
        canvas: side of the square frame, in pixels.
        digits: digits per video. Each adds three words to the caption: which, and where it sets out to across and down.
        digit_size: side of a digit, in pixels.
        speed: pixels per frame that a digit moves, in each direction.
        uncaptioned: share of videos whose caption is all null tokens, for classifier-free guidance.
        seed: of everything drawn.
    """

    def __init__(
        self,
        length: int,
        frames: int = 7,
        canvas: int = 20,
        digits: int = 1,
        digit_size: int = 16,
        speed: int = 1,
        uncaptioned: float = 0.1,
        seed: int = 0,
    ) -> None:
        if canvas - digit_size < speed:
            room = f"canvas={canvas} - digit_size={digit_size} = {canvas - digit_size} pixels"
            raise ValueError(f"a digit that moves by speed={speed} per frame needs as much room, but {room}")
        self.length, self.frames, self.canvas, self.digits = length, frames, canvas, digits
        self.digit_size, self.speed, self.uncaptioned, self.seed = digit_size, speed, uncaptioned, seed
        scans = load_digits()
        self.classes = scans.target
        images = torch.from_numpy(scans.images).float()[:, None] / 16.0
        self.images = F.interpolate(images, size=(digit_size, digit_size), mode="bilinear")[:, 0].numpy()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample.

        Returns:
            video: [T, 1, canvas, canvas], fp32 in [-1, 1], background -1.
            labels: token ids [3 * digits], int64: see `VOCABULARY`; `NULL_TOKEN` where the caption is left out.
            t: diffusion time, scalar fp32 in [0, 1).
            noise: standard normal, fp32, in the video's shape.

        Raises:
            IndexError: past the end, which is how iteration over a sequence stops.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} in a data set of {self.length} videos")
        draw = np.random.default_rng([self.seed, index])
        size, room = self.digit_size, self.canvas - self.digit_size
        video = np.zeros((self.frames, self.canvas, self.canvas), dtype=np.float32)
        labels = []
        for _ in range(self.digits):
            scan = draw.integers(len(self.images))
            direction = draw.choice([-1, 1], size=2)
            across, along = (bounce(self._start(draw, way), way * self.speed, self.frames, room) for way in direction)
            for frame, (top, left) in enumerate(zip(along, across, strict=True)):
                window = video[frame, top : top + size, left : left + size]
                np.maximum(window, self.images[scan], out=window)
            words = ("left" if direction[0] < 0 else "right", "up" if direction[1] < 0 else "down")
            labels += [int(self.classes[scan]), *(VOCABULARY.index(word) for word in words)]
        if draw.random() < self.uncaptioned:
            labels = [NULL_TOKEN] * len(labels)
        noise = draw.standard_normal((self.frames, 1, self.canvas, self.canvas), dtype=np.float32)
        return {
            "video": torch.from_numpy(2.0 * video[:, None] - 1.0),
            "labels": torch.tensor(labels),
            "t": torch.tensor(draw.random(), dtype=torch.float32),
            "noise": torch.from_numpy(noise),
        }

    def _start(self, draw: np.random.Generator, way: int) -> int:
        """A first position with room ahead, so that the first step goes where the caption says."""
        room = self.canvas - self.digit_size
        return int(draw.integers(self.speed, room + 1) if way < 0 else draw.integers(0, room - self.speed + 1))
