"""A Llama as DeepSpeed's pipeline: its layers in a row, under the names of the plain model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, set_autotp_mode
from deepspeed.module_inject.tp_shard import AutoTPMeta
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn import functional

import lorapre_dist
from lorapre_dist.config import ConfigError
from lorapre_dist.layouts.geometry import axes
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.run.evaluation import Evaluation

_IGNORED = -100


class Block(nn.Module):
    """One layer, which works out by itself where its tokens stand."""

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, hidden: Tensor) -> Tensor:
        """B x s x h to b x s x h, causal."""
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        found = self.layer(hidden, position_ids=places, position_embeddings=self.rotary(hidden, places))
        return found[0] if isinstance(found, tuple) else found


class NextToken:
    """Cross entropy of each next token, b x s x vocabulary and labels b x s: its mean, or, ``summed``, its sum."""

    def __init__(self) -> None:
        self.summed = False

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels of -100 count nothing."""
        each, wanted = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        return functional.cross_entropy(each, wanted, reduction="sum" if self.summed else "mean")


def check(model: Any, stages: int, parts: int = 1) -> None:
    """Whether a model can be dealt out to so many stages, and its matrices be split over so many ranks.

    Raises:
        ConfigError: it has no pipeline form, fewer layers than stages, or heads that cannot be split so.
    """
    config, named = model.config, f"--pipeline {stages}: {type(model).__name__}"
    if type(model).__name__ != "LlamaForCausalLM" or config.tie_word_embeddings:
        raise ConfigError(f"{named} has no pipeline form here; take a Llama without tied embeddings, or --pipeline 1")
    if config._attn_implementation != "sdpa":
        raise ConfigError(f"{named} with attention {config._attn_implementation!r}: a pipeline needs 'sdpa'")
    if config.num_key_value_heads % parts:
        raise ConfigError(
            f"--tensor {parts}: must divide the {config.num_key_value_heads} key-value heads of the model"
        )
    if stages > len(model.model.layers):
        raise ConfigError(f"{named} has {len(model.model.layers)} layers, which are fewer than stages")


def own_parameters(model: Any, stages: int) -> set[str]:
    """Names of the parameters of this rank's stage."""
    named = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return set(axes.stages(named, stages)[dist.get_rank() // (dist.get_world_size() // stages)])


def pipeline(model: Any, stages: int, parts: int = 1) -> Any:
    """``model`` in so many stages; a collective. This rank's holds its own layers alone.

    Args:
        model: one that passes :func:`check`; parameters of other stages may have no storage.
        parts: ranks that each matrix of a stage is split over, as AutoTP does: neighbours.
    """
    inner = model.model
    blocks = [Block(layer, inner.rotary_emb) for layer in inner.layers]
    layers = [inner.embed_tokens, *blocks, inner.norm, model.lm_head]
    copies = dist.get_world_size() // (stages * parts)
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=parts, num_dp=copies)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints all its layers
        made = PipelineModule(layers, topology=topology, loss_fn=NextToken())
    made._layer_specs = [None] * len(layers)  # the other stages' layers can go
    if parts > 1:
        _split(made, AutoTPMeta.from_model_config(model.config), str(len(layers) - 1))
    last = len(blocks) + 1
    names = {"0": "model.embed_tokens", str(last): "model.norm", str(last + 1): "lm_head"}
    names |= {f"{k}.layer": f"model.layers.{k - 1}" for k in range(1, last)}
    lorapre_dist.deepspeed.name_layers(made, names)
    return made


def _split(stage: Any, meta: AutoTPMeta, head: str) -> None:
    """Split the linear layers of a stage over the ranks that share it, with the layers of DeepSpeed's AutoTP.

    AutoTP itself makes groups of its own, of all ranks, which a pipeline's stages are not.
    """
    set_autotp_mode(training=True)
    group = stage._grid.get_slice_parallel_group()
    for name, module in list(stage.named_modules()):
        for key, child in list(module.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            path = f"{name}.{key}".strip(".")
            if key in ("o_proj", "down_proj"):
                made: nn.Module = LinearAllreduce(child, group, name=path, tp_meta=meta)
            else:
                made = LinearLayer(child, group, name=path, gather_output=path == head, tp_meta=meta)
            setattr(module, key, made)
    # A pipeline calls its layers from a list of its own.
    stage.forward_funcs = [stage._modules.get(head, f) if isinstance(f, nn.Linear) else f for f in stage.forward_funcs]


def train_step(engine: Any, micro_batches: Sequence[Tensor]) -> Tensor:
    """One optimizer step; the mean loss over all of the batch, the same on every rank."""
    loss: Tensor = engine.train_batch(iter([(tokens, tokens) for tokens in micro_batches]))
    return loss.detach().float()


def evaluate(engine: Any, held_out: np.ndarray, plan: BatchPlan) -> Evaluation:
    """As :func:`lorapre_dist.training.run.evaluation.evaluate`; sums are in fp32."""
    share, longest = plan.share(len(held_out)), -(-len(held_out) // plan.world_size)
    starts = range(share.start, share.start + longest, plan.micro_batch)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in starts:
            places = range(start, start + plan.micro_batch)
            tokens = torch.from_numpy(held_out[[i if i in share else 0 for i in places]].astype(np.int64))
            labels = tokens.clone()
            labels[[i not in share for i in places]] = _IGNORED
            yield tokens, labels

    engine.module.loss_fn.summed = True
    try:
        mean = engine.eval_batch(batches(), num_micro_batches=len(starts))
    finally:
        engine.module.loss_fn.summed = False
        engine.train()
    tokens = len(held_out) * (held_out.shape[1] - 1)
    return Evaluation(float(mean) * len(starts) * plan.world_size / tokens)
