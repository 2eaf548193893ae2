"""The shapes of a decoder of text, by which its memory and its time can be told without building it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.mask import MaskSpec


@dataclass(frozen=True)
class Experts:
    """Of layers whose MLP is a mixture of experts.

    Attributes:
        count: of a layer.
        chosen: for each token.
        intermediate: width inside one.
        shared: width inside the MLP that all tokens pass beside them; 0 for none.
        dense_layers: layers that have none.
    """

    count: int
    chosen: int
    intermediate: int
    shared: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Shapes:
    """What a causal language model consists of.

    Attributes:
        layers: of attention and MLP.
        hidden: width of the residual stream.
        heads: query heads. kv_heads: key/value heads. head_dim: width of either.
        intermediate: width inside an MLP.
        vocabulary: rows of the embedding.
        tied: whether the head's weight is the embedding's.
        gated: whether an MLP has a gate, and so two matrices at its entrance.
        experts: of a mixture of experts; None for plain MLPs.
        windows: left reach of each windowed layer; all others see every token before.
        positions: tokens that the model was made for; None where nobody says.
        source: where the shapes are from, for messages.

    Raises:
        SequenceParallelConfigError: a count that is none, or head counts that do not divide.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    gated: bool = True
    experts: Experts | None = None
    windows: tuple[int, ...] = ()
    positions: int | None = None
    source: str = field(default="shapes", compare=False)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SequenceParallelConfigError(
                    setting=f"{self.source}: {name}",
                    value=value,
                    why="a model has an integer of 1 or more of these",
                    remedy="name a config of a causal language model",
                )
        if self.heads % self.kv_heads:
            raise SequenceParallelConfigError(
                setting=f"{self.source}: kv_heads",
                value=self.kv_heads,
                why=f"{self.heads} query heads do not divide into {self.kv_heads} groups",
                remedy="correct the config",
            )

    @property
    def attention_parameters(self) -> int:
        """Of one layer: the four projections."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def entrances(self) -> int:
        """Matrices at the entrance of an MLP: its gate, if it has one, and the way up."""
        return 2 if self.gated else 1

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP."""
        return self.entrances + 1

    @property
    def layer_parameters(self) -> int:
        """Of the largest layer, two norms included."""
        return self.attention_parameters + self._mlp_parameters(dense=False) + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the matrix that makes logits; the embedding is as large."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model; biases and norms of heads, which are small, are left out."""
        dense = self.layers if self.experts is None else self.experts.dense_layers
        layers = dense * (self._mlp_parameters(dense=True)) + (self.layers - dense) * self._mlp_parameters(dense=False)
        layers += self.layers * (self.attention_parameters + 2 * self.hidden)
        return layers + self.head_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied by: those of its experts only, and the head's."""
        active = self.layers * self.attention_parameters + self.head_parameters
        if self.experts is None:
            return active + self.layers * self._mlp_parameters(dense=True)
        mine, dense = self.experts, self.experts.dense_layers
        token = self.mlp_matrices * self.hidden * (mine.chosen * mine.intermediate + mine.shared)
        return active + dense * self._mlp_parameters(dense=True) + (self.layers - dense) * token

    @property
    def mlp_width(self) -> int:
        """Values inside the MLP of one token, where most are alive."""
        if self.experts is None:
            return self.intermediate
        widest = self.experts.chosen * self.experts.intermediate + self.experts.shared
        return max(widest, self.intermediate if self.experts.dense_layers else 0)

    def mask_of(self, window: int | None) -> MaskSpec:
        """Of a layer with this left reach."""
        return MaskSpec(causal=True, window=None if window is None else (window, 0))

    def kinds(self) -> dict[int | None, int]:
        """How many layers there are of every left reach; None sees all."""
        kinds: dict[int | None, int] = {}
        for window in self.windows:
            kinds[window] = kinds.get(window, 0) + 1
        if self.layers > len(self.windows):
            kinds[None] = self.layers - len(self.windows)
        return kinds

    def of_stage(self, stages: int) -> Shapes:
        """Those of the largest of ``stages`` pipeline stages, without the embedding and the head that it may hold."""
        return replace(self, layers=-(-self.layers // stages), windows=self.windows[: -(-self.layers // stages)])

    def _mlp_parameters(self, dense: bool) -> int:
        if dense or self.experts is None:
            return self.mlp_matrices * self.hidden * self.intermediate
        mine = self.experts
        inside = mine.count * mine.intermediate + mine.shared
        return self.mlp_matrices * self.hidden * inside + mine.count * self.hidden
