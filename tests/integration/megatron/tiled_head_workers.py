"""What the ranks of `dsp_plugin.spawn` do in the tests of Megatron's tiled head."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron_workers import initialized, message
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsp_plugin.comm.ledger import ledger
from dsp_plugin.patches import megatron

BATCH, LENGTH, HIDDEN, VOCABULARY, TILE = 2, 24, 16, 768, 7
MTP = 2


def short_world() -> dict[str, Any]:
    """What CI looks at, on ranks that share the vocabulary."""
    return {
        "sizes": sizes_and_traffic(),
        "errors": errors(sequence_parallel=True),
        "refused": refused(),
        "predictions": predictions(),
    }


@contextmanager
def world(memory: Any, **sizes: int) -> Iterator[None]:
    """Megatron's groups, with the plugin and its memory setting."""
    megatron.install("ulysses", memory=memory, quiet=True)
    with initialized(None, **sizes):
        yield


def settings(**others: Any) -> dict[str, Any]:
    """Of a configuration in fp64."""
    from megatron.core import parallel_state

    return {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float64,
        **others,
    }


def gpt(
    *,
    tied: bool = True,
    multi_token: bool = False,
    kind: Any = None,
    parallel_output: bool = True,
    positions: str = "rope",
    **of: Any,
) -> Any:
    """A model of one layer, alike on every rank but for its part."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(**settings(**({"mtp_num_layers": MTP} if multi_token else {}), **of))
    layer = get_gpt_layer_local_spec()
    model = (kind or GPTModel)(
        config,
        layer,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=positions,
        parallel_output=parallel_output,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layer, False) if multi_token else None,
    )
    # Norms are in fp32 whatever the parameters are to be in.
    model.to(config.params_dtype)
    draw(model)
    return model


def draw(model: Any) -> None:
    """Weights large enough that logits differ."""
    generator = torch.Generator().manual_seed(7)
    tp = model.pg_collection.tp
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                whole = torch.randn(
                    [
                        size * (tp.size() if getattr(parameter, "partition_dim", -1) == dim else 1)
                        for dim, size in enumerate(parameter.shape)
                    ],
                    generator=generator,
                    dtype=torch.float64,
                )
                sharded = getattr(parameter, "tensor_model_parallel", False)
                parameter.copy_(whole.chunk(tp.size(), parameter.partition_dim)[tp.rank()] if sharded else whole)


def batch() -> dict[str, Any]:
    """Tokens, labels of which one is none and the last of the vocabulary never come, and a mask."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY - 8, (2, BATCH, LENGTH), generator=generator)
    labels[0, 5] = -100
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "attention_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None],
        "labels": labels,
    }


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the tokens, and every gradient of a sum of these that weighs them unlike."""
    model.zero_grad()
    losses = model(**batch())
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    (losses * weights).sum().backward()
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def whole_step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the logits of all tokens and the whole vocabulary, by torch in fp64."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model.zero_grad()
    given = batch()
    labels = given.pop("labels")
    logits = gather_from_tensor_model_parallel_region(model(**given), group=model.pg_collection.tp)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(BATCH, LENGTH)
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    (losses * weights).sum().backward()
    return losses.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def errors(sequence_parallel: bool) -> dict[str, float]:
    """By model, the largest relative error of losses and gradients against torch on whole logits."""
    found = {}
    with world({"tile_tokens": TILE}, tensor_model_parallel_size=dist.get_world_size()):
        kinds: dict[str, dict[str, Any]] = {"tied": {}, "untied": {"tied": False}}
        if _has_mup():
            kinds["MuP"] = {"use_mup": True, "mup_base_hidden_size": HIDDEN // 4}
        for name, of in kinds.items():
            model = gpt(sequence_parallel=sequence_parallel, **of)
            found[name] = largest_error(step(model), whole_step(model))
    return found


def largest_error(found: Any, wanted: Any) -> float:
    """Of losses and gradients, relative to the largest of each."""
    (losses, grads), (right_losses, right_grads) = found, wanted
    assert grads.keys() == right_grads.keys()
    pairs = [(losses, right_losses), *((grads[name], right_grads[name]) for name in grads)]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def _has_mup() -> bool:
    from megatron.core.transformer import TransformerConfig

    return "use_mup" in inspect.signature(TransformerConfig).parameters


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation makes, and keeps the size of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def sizes_and_traffic() -> dict[str, Any]:
    """The largest tensor of a step and what it sent, with tiles and without."""
    found: dict[str, Any] = {}
    ranks = dist.get_world_size()
    for name, memory in {"tiled": {"tile_tokens": TILE}, "whole": None}.items():
        with world(memory, tensor_model_parallel_size=ranks):
            model = gpt(multi_token=True)
            with Largest() as largest, ledger() as sent:
                step(model)
            found[name] = largest.elements
            found[f"{name}, sent"] = [tuple(row) for row in sent.rows()]
    found["logits"] = BATCH * LENGTH * VOCABULARY // ranks
    found["weight"] = VOCABULARY // ranks * HIDDEN
    multi_token = importlib.import_module("megatron.core.transformer.multi_token_prediction")
    found["predicts"] = int(hasattr(multi_token, "_compute_mtp_acceptance_counts"))
    return found


class Stack(torch.nn.Module):
    """What a hybrid model has between its embedding and its head, at its least."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """A layer, [s, b, h]."""
        return hidden_states + self.linear(hidden_states).tanh()


def hybrid_error() -> float:
    """As `errors`, of the class of hybrids that there is."""
    with world({"tile_tokens": TILE}, tensor_model_parallel_size=dist.get_world_size()):
        from megatron.core.models.mamba import MambaModel
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.spec_utils import ModuleSpec

        model = MambaModel(
            TransformerConfig(**settings()),
            mamba_stack_spec=ModuleSpec(module=Stack),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
        )
        draw(model)
        return largest_error(step(model), whole_step(model))


def traffic_of_a_sharded_sequence() -> dict[str, Any]:
    """What a step of TP2 x CP2 sends, with tiles and without."""
    found: dict[str, Any] = {}
    for name, memory in {"tiled": {"tile_tokens": TILE}, "whole": None}.items():
        with world(memory, tensor_model_parallel_size=2, context_parallel_size=2):
            model = gpt()
            share = LENGTH // 2
            given = {key: value[:, :share] for key, value in batch().items() if key != "attention_mask"}
            with ledger() as sent:
                model(**given, attention_mask=None).sum().backward()
            found[name] = [tuple(row) for row in sent.rows()]
    return found


def refused() -> dict[str, str]:
    """What is not known, each with the error on this rank."""
    from torch.nn import Module

    found = {}
    with world({"tile_tokens": TILE}, tensor_model_parallel_size=dist.get_world_size()):
        from megatron.core.models.common.language_module.language_module import LanguageModule
        from megatron.core.models.gpt import GPTModel

        class OwnLoss(GPTModel):
            """A model that takes its loss in its own way."""

            def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
                return logits.float().square().mean(-1)

        class OwnHead(Module):
            """An output layer that is not Megatron's."""

        class Sibling(LanguageModule):
            """A model of another kind."""

        from megatron.core.transformer import TransformerConfig

        found["loss"] = message(lambda: gpt(kind=OwnLoss))
        found["gathered"] = message(lambda: gpt(parallel_output=False))
        found["kind"] = message(lambda: Sibling(TransformerConfig(**settings())))
        deferring = TransformerConfig(**settings())
        deferring.defer_embedding_wgrad_compute = True
        found["deferred gradient"] = message(lambda: GPTModel(deferring, None, VOCABULARY, LENGTH))
        model = gpt()
        if "output_processor" in inspect.signature(GPTModel.forward).parameters:
            found["processor"] = message(lambda: model(**batch(), output_processor=lambda **_: None))
        found["gathered when called"] = message(lambda: model(**batch(), runtime_gather_output=True))
        found["still works"] = message(lambda: model(**batch()))
        found["forward left"] = str("forward" in vars(model.output_layer))
        model.output_layer = OwnHead()
        found["layer"] = message(lambda: model(**batch()))
        for name, call in DONE_TO_LOGITS.items():
            found[name] = message(lambda call=call: call(deferred()))
        found["scaled"] = str((2 * deferred() / 8 * 3).scale)
    return found


DONE_TO_LOGITS: dict[str, Callable[[Any], Any]] = {
    "a soft cap": torch.tanh,
    "a cast": lambda logits: logits.float(),
    "a sum": lambda logits: torch.zeros(1) + logits,
    "a tensor's product": lambda logits: logits * torch.ones(1),
}


def deferred() -> Any:
    """What an output layer returns."""
    from dsp_plugin.comm.axis import Axis
    from dsp_plugin.patches.megatron.deferred_logits import DeferredLogits

    return DeferredLogits(torch.randn(5, 2, 4), torch.randn(9, 4), None, Axis.alone("tp"), 3)


def predictions() -> bool:
    """Whether those of tiles are those of whole logits, two of which are alike."""
    from dsp_plugin.comm.axis import Axis
    from dsp_plugin.patches.megatron.deferred_logits import DeferredLogits

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 2, 4, generator=generator)
    weight = torch.randn(10, 4, generator=generator)
    # The same entry on either rank, and twice on one.
    weight[2] = 9 * hidden[0, 0]
    weight[7], weight[3] = weight[2], weight[2]
    tp = Axis.of_group("tp", dist.group.WORLD)
    mine = weight.chunk(tp.size)[tp.rank]
    logits = hidden @ weight.T
    assert logits[0, 0].argmax() == 2
    same = [
        torch.equal(DeferredLogits(hidden, mine, None, tp, 3, scale).predictions(), (logits * scale).argmax(-1))
        for scale in (1.0, -0.5)
    ]
    return all(same)


def fused_gradients() -> dict[str, float]:
    """With Apex's fused weight gradients, told by a double: how far tiles are from whole logits in `main_grad`."""
    from megatron.core.tensor_parallel import layers

    def accumulate(inputs: Tensor, grads: Tensor, main_grad: Tensor) -> None:
        main_grad.add_(grads.flatten(0, -2).t() @ inputs.flatten(0, -2))

    vars(layers)["_grad_accum_fusion_available"] = True
    vars(layers)["fused_weight_gradient_mlp_cuda"] = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    found = {}
    for tied in (True, False):
        whole, tiled = (_main_grads(memory, tied) for memory in (None, {"tile_tokens": TILE}))
        found["tied" if tied else "untied"] = max(
            ((tiled[name] - right).norm() / right.norm()).item() for name, right in whole.items()
        )
    return found


def _main_grads(memory: Any, tied: bool) -> dict[str, Tensor]:
    with world(memory, tensor_model_parallel_size=dist.get_world_size()):
        distributed = importlib.import_module("megatron.core.distributed")
        model = gpt(tied=tied, multi_token=True, gradient_accumulation_fusion=True, params_dtype=torch.float32)
        wrapped = distributed.DistributedDataParallel(
            model.config, distributed.DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
        )
        given = batch()
        # Whole logits have a gradient of a label that is none; it is for a loss mask to hide.
        given["labels"].clamp_(min=0)
        for _ in range(2):
            wrapped.zero_grad_buffer()
            for _ in range(2):
                wrapped(**given).sum().backward()
        return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
