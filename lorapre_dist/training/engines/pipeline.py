"""A Llama as DeepSpeed's pipeline: its layers in a row, under the names of the plain model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.nn import functional

import lorapre_dist
from lorapre_dist.config import ConfigError
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


def pipeline(model: Any, stages: int) -> Any:
    """``model`` (a ``LlamaForCausalLM``) in so many stages; a collective. This rank's holds its own layers alone.

    Raises:
        ConfigError: the model has no pipeline form, or fewer layers than stages.
    """
    config, named = model.config, f"--pipeline {stages}: {type(model).__name__}"
    if type(model).__name__ != "LlamaForCausalLM" or config.tie_word_embeddings:
        raise ConfigError(f"{named} has no pipeline form here; take a Llama without tied embeddings, or --pipeline 1")
    if config._attn_implementation != "sdpa":
        raise ConfigError(f"{named} with attention {config._attn_implementation!r}: a pipeline needs 'sdpa'")
    inner = model.model
    blocks = [Block(layer, inner.rotary_emb) for layer in inner.layers]
    if stages > len(blocks):
        raise ConfigError(f"{named} has {len(blocks)} layers, which are fewer than stages")
    layers = [inner.embed_tokens, *blocks, inner.norm, model.lm_head]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints all its layers
        made = PipelineModule(layers, num_stages=stages, loss_fn=NextToken())
    made._layer_specs = [None] * len(layers)  # the other stages' layers can go
    last = len(blocks) + 1
    names = {"0": "model.embed_tokens", str(last): "model.norm", str(last + 1): "lm_head"}
    names |= {f"{k}.layer": f"model.layers.{k - 1}" for k in range(1, last)}
    lorapre_dist.deepspeed.name_layers(made, names)
    return made


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
