"""A language model of linear attention: gated mixers with a choice of decays, GLUs, and softmax layers in between.

Plain torch and einops, on one device, with no knowledge of parallelism. Only mixers look at other tokens, by calls of
`linear_attention`, `short_convolution` and `scaled_dot_product_attention`. In reading order: the config, gates, the
mixers, the layer, the model `LinearLM`, its first weights.

Shape suffixes:
    B  batch           C  model width
    n  tokens          H  attention heads
    U  vocabulary      K  key dim of a head
    W  taps of the     V  value dim of a head, C / H
       convolution     A  angles of rotary positions, V / 2

Sources: the model is TransNormerLLM's (arXiv 2307.14995). Decays are of TransNormerLLM (head), Mamba-2 (scalar, arXiv
2405.21060), GLA (vector, 2312.06635), DeltaNet (2406.06484), Gated DeltaNet (2412.06464) and Kimi Linear (kda,
2510.26692).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import DECAYS, linear_attention
from dsp_plugin.tiles.head import tiled_loss


@dataclass(frozen=True)
class LinearLMConfig:
    """Sizes and kinds.

    Attributes:
        vocab: number of token ids U.
        width: C.
        layers: how many.
        heads: H, a divisor of the width.
        key_dim: K, ``width / heads`` when None.
        hidden: width inside the GLU, 8/3 of the model width when None.
        decay: of the linear layers' states, one of `dsp_plugin.kernels.linear.DECAYS`.
        softmax_every: every how many layers one has softmax attention, the last of each group; 0 for none.
        conv: taps of the convolution of queries, keys and values in linear layers; 0 for none.
        mixer_norm_eps: in the norm of what linear layers read. A token may read next to nothing; a norm that blows that
            up to full size blows up rounding with it, and runs that differ by rounding part within tens of steps.
        tie_embeddings: the output weights are the embedding's.
        checkpoint: recompute each layer in the backward pass of training.
        tile_tokens: tokens of which the loss has logits at once; None for all of them.
        seed: of the first weights.

    Raises:
        ValueError: the sizes do not fit.
    """

    vocab: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    key_dim: int | None = None
    hidden: int | None = None
    decay: str = "head"
    softmax_every: int = 0
    conv: int = 0
    mixer_norm_eps: float = 1e-2
    tie_embeddings: bool = True
    checkpoint: bool = False
    tile_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay!r}: choose from {', '.join(DECAYS)}")
        if self.width % self.heads:
            rest = self.width % self.heads
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}: the remainder is {rest}")
        if self.softmax_every and self.v_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs, and the head dim, width / heads, is {self.v_dim}: make it even"
            )

    @property
    def v_dim(self) -> int:
        """V; the head dim of softmax layers too."""
        return self.width // self.heads

    @property
    def k_dim(self) -> int:
        """K."""
        return self.v_dim if self.key_dim is None else self.key_dim

    def is_softmax(self, layer: int) -> bool:
        """Whether the layer of that index has softmax attention."""
        return self.softmax_every > 0 and (layer + 1) % self.softmax_every == 0


def wide(x: Tensor) -> Tensor:
    """In fp32 or wider: what is exponentiated or summed over a sequence must not be rounded to bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HeadDecay(nn.Module):
    """A fixed decay per head: few tokens back for the first head, far for the last, and further in later layers."""

    slope: Tensor

    def __init__(self, config: LinearLMConfig, layer: int) -> None:
        super().__init__()
        slope_H = 2.0 ** (-8.0 * torch.arange(1, config.heads + 1) / config.heads)
        self.register_buffer("slope", slope_H * (1 - layer / config.layers), persistent=False)

    def forward(self, x_BnC: Tensor) -> Tensor:
        """Log decays [H]."""
        return -wide(self.slope)


class ScalarDecay(nn.Module):
    """Mamba-2's decay per token and head: a step that depends on the token, times a rate of the head."""

    def __init__(self, config: LinearLMConfig) -> None:
        super().__init__()
        self.step = nn.Linear(config.width, config.heads)
        self.log_rate = nn.Parameter(torch.empty(config.heads))

    def forward(self, x_BnC: Tensor) -> Tensor:
        """Log decays [B, n, H]."""
        return -F.softplus(wide(self.step(x_BnC))) * wide(self.log_rate).exp()


class VectorDecay(nn.Module):
    """GLA's decay per token and key dim, from a low rank; a 16th, so that states live long at first."""

    def __init__(self, config: LinearLMConfig, rank: int = 16) -> None:
        super().__init__()
        self.heads = config.heads
        self.down = nn.Linear(config.width, rank, bias=False)
        self.up = nn.Linear(rank, config.heads * config.k_dim)

    def forward(self, x_BnC: Tensor) -> Tensor:
        """Log decays [B, n, H, K]."""
        return F.logsigmoid(wide(self.up(self.down(x_BnC)))).unflatten(-1, (self.heads, -1)) / 16


def decay_gate(config: LinearLMConfig, layer: int) -> nn.Module | None:
    """What makes the log decays of a layer; None where states do not decay."""
    match config.decay:
        case "head":
            return HeadDecay(config, layer)
        case "scalar" | "gated-delta":
            return ScalarDecay(config)
        case "vector" | "kda":
            return VectorDecay(config)
    return None


class LinearMixer(nn.Module):
    """Multi-head linear attention; its output is normalised and gated."""

    def __init__(self, config: LinearLMConfig, layer: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.delta = config.decay in ("delta", "gated-delta", "kda")
        self.widths = (config.heads * config.k_dim, config.heads * config.k_dim, config.width)
        self.qkv = nn.Linear(config.width, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), config.conv)) if config.conv else None
        self.decay = decay_gate(config, layer)
        self.beta = nn.Linear(config.width, config.heads, bias=False) if self.delta else None
        self.norm = plain_norm(config.v_dim, config.mixer_norm_eps)
        self.gate = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BnC: Tensor, rope: Tensor | None) -> Tensor:
        """Returns [B, n, C]. Order comes from decays and convolution, not from the rotary table."""
        qkv = self.qkv(x_BnC)
        if self.conv_weight is not None:
            qkv = short_convolution(qkv, self.conv_weight)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.split(self.widths, -1))
        q_BnHK, k_BnHK = F.silu(q), F.silu(k)
        if self.delta:
            # Where a delta rule writes along keys of unit length, it replaces what the state held there.
            q_BnHK, k_BnHK = (F.normalize(part, dim=-1, eps=1e-6).to(v.dtype) for part in (q_BnHK, k_BnHK))
        g = None if self.decay is None else self.decay(x_BnC)
        beta_BnH = None if self.beta is None else wide(self.beta(x_BnC)).sigmoid()
        out_BnHV = linear_attention(q_BnHK, k_BnHK, v, g, beta_BnH)
        assert isinstance(out_BnHV, Tensor)
        return self.out(self.norm(out_BnHV).flatten(2) * self.gate(x_BnC).sigmoid())


def rotate(x_BHnV: Tensor, rope_BnA: Tensor) -> Tensor:
    """Turn the feature pairs (i, i + V/2) of every token by its position's angles (arXiv 2104.09864)."""
    cos, sin = (table.to(x_BHnV.dtype).unsqueeze(1) for table in (rope_BnA.cos(), rope_BnA.sin()))
    first, second = x_BHnV.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SoftmaxMixer(nn.Module):
    """Causal multi-head softmax attention with rotary positions."""

    def __init__(self, config: LinearLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BnC: Tensor, rope: Tensor | None) -> Tensor:
        """Returns [B, n, C]."""
        assert rope is not None
        q, k, v = rearrange(self.qkv(x_BnC), "b n (qkv h v) -> qkv b h n v", qkv=3, h=self.heads)
        out_BHnV = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True)
        return self.out(rearrange(out_BHnV, "b h n v -> b n (h v)"))


class GLU(nn.Module):
    """Two linear maps multiplied, without an activation, and one back (SGLU in TransNormerLLM)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BnC: Tensor) -> Tensor:
        """Returns [B, n, C]."""
        return self.down(self.up(x_BnC) * self.gate(x_BnC))


def plain_norm(width: int, eps: float = 1e-6) -> nn.RMSNorm:
    """RMS norm without weights."""
    return nn.RMSNorm(width, eps=eps, elementwise_affine=False)


class Layer(nn.Module):
    """Mixer, then GLU, each after a norm and added to what came in."""

    def __init__(self, config: LinearLMConfig, layer: int) -> None:
        super().__init__()
        hidden = config.width * 8 // 3 if config.hidden is None else config.hidden
        self.norm_mixer, self.norm_glu = plain_norm(config.width), plain_norm(config.width)
        self.mixer = SoftmaxMixer(config) if config.is_softmax(layer) else LinearMixer(config, layer)
        self.glu = GLU(config.width, hidden)

    def forward(self, x_BnC: Tensor, rope: Tensor | None) -> Tensor:
        """Returns [B, n, C]; `rope` are the angles of the tokens' positions [B, n, A], for softmax attention."""
        x_BnC = x_BnC + self.mixer(self.norm_mixer(x_BnC), rope)
        return x_BnC + self.glu(self.norm_glu(x_BnC))


class LinearLM(nn.Module):
    """Predicts the token that follows each token."""

    def __init__(self, config: LinearLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = plain_norm(config.width)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab, bias=False)
        initialise(self, config.seed)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The mean loss where there are labels, else the logits.

        Args:
            input_ids: int64 [B, n].
            labels: int64 [B, n], the token that follows each token, shifted already; -100 where none counts.
            position_ids: int64 [B, n] or [1, n], 0 to n - 1 when None; only softmax layers look at them.

        Returns:
            Scalar, in fp32 or wider, or [B, n, U].
        """
        rope = self._rope(input_ids, position_ids) if self.config.softmax_every else None
        x_BnC = self.embed(input_ids)
        for layer in self.layers:
            if self.config.checkpoint and self.training:
                x_BnC = checkpoint(layer, x_BnC, rope, use_reentrant=False)
            else:
                x_BnC = layer(x_BnC, rope)
        x_BnC, weight_UC = self.norm(x_BnC), (self.embed if self.head is None else self.head).weight
        if labels is not None and self.config.tile_tokens is not None:
            return tiled_loss(x_BnC, weight_UC, labels, tile_tokens=self.config.tile_tokens) / (labels != -100).sum()
        logits_BnU = F.linear(x_BnC, weight_UC)
        if labels is None:
            return logits_BnU
        return F.cross_entropy(wide(logits_BnU).flatten(0, 1), labels.flatten(), ignore_index=-100)

    def _rope(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Angles [B or 1, n, A], fp64: position times frequencies that fall from 1 to about 1 / 10,000."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        count = self.config.v_dim // 2
        frequency_A = 10_000.0 ** (-torch.arange(count, dtype=torch.float64, device=input_ids.device) / count)
        return position_ids.unsqueeze(-1) * frequency_A


@torch.no_grad()
def initialise(model: LinearLM, seed: int) -> None:
    """First weights, the same on every device and for every number of ranks: random by ``seed``, rates as in Mamba-2.

    What is random keeps the size of what it multiplies; what adds to the residual stream is smaller by the layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("log_rate"):
            parameter.copy_(torch.linspace(1.0, 16.0, len(parameter)).log())
        elif name.endswith("step.bias"):
            # What softplus makes steps of 0.001 to 0.1.
            parameter.copy_(torch.logspace(-3.0, -1.0, len(parameter)).expm1().log())
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            residual = name.endswith(("out.weight", "down.weight")) and "decay" not in name
            size = (2 * model.config.layers) ** -0.5 if residual else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size * parameter.shape[1] ** -0.5)
