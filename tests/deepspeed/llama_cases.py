"""What runs on the ranks of the tests with a real Llama."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import lorapre_dist
from lorapre_dist.config import LoRAPreConfig
from tests import oracle

from .cases import PARAMS, ds_config, full_parameters, worst


def llama_case(rank: int, world_size: int, *, stage: int, steps: int) -> tuple[float, str, float]:
    """A real Llama with a real loss, each rank on its own batch, against autograd and the reference on one process."""
    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=61,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    batches = [torch.randint(61, (world_size, 2, 16), generator=torch.Generator().manual_seed(s)) for s in range(steps)]

    def model() -> torch.nn.Module:
        torch.manual_seed(5)
        return LlamaForCausalLM(shape)

    options = {**PARAMS, "lr": 1e-3, "target_modules": ["self_attn", "mlp"]}
    config = ds_config(stage, "fp32", 1, 1.0, options)
    engine = lorapre_dist.initialize(model=model(), config=config)[0]
    for batch in batches:
        engine.backward(engine(input_ids=batch[rank], labels=batch[rank]).loss)
        engine.step()
    got = full_parameters(engine)
    engine.destroy()
    dist.barrier()

    settings, single = LoRAPreConfig(**options), model().double()
    named = dict(single.named_parameters())
    theta = {n: p.data for n, p in named.items()}
    state = oracle.init(theta, settings, lambda n, _: "proj" in n)
    for batch in batches:
        single.zero_grad()
        loss = sum(single(input_ids=part, labels=part).loss for part in batch) / world_size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        oracle.step(theta, {n: p.grad for n, p in named.items()}, state, settings)
    error, name = worst(got, theta)
    return error, name, float(loss)
