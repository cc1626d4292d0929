"""Bytes of activations of a Llama at each instant of a forward and backward pass, by formula.

It is for blocks as transformers' ``LlamaForCausalLM`` has them, with attention that keeps no scores
(``scaled_dot_product_attention``'s flash form: q, k, v, its result, and one fp32 number a head and position). ``h`` is
the hidden size, ``q`` and ``k`` the widths of queries, and of keys and values, ``i`` the MLP's, ``V`` the vocabulary;
``e`` is bytes in the precision of computation, ``s`` of the residual stream (4 in fp32 and under autocast, else 2).
What autograd keeps, bytes a token:

    a norm         its input in fp32 and normalised, 4 h + s h, and what the products after it take, e h; under autocast
                   that is cast for each of them by itself: 3 e h and 2 e h (the head: e h)
    attention      q, k, v after rotation and the result, e (2 q + 2 k), and 4 a head
    MLP            gate, its activation, up and their product: 4 e i
    head and loss  a norm, and log-softmax in fp32: 4 V
    all blocks     the rotation's cosines and sines, 2 s of a head's width

``checkpointing`` keeps the input of each block instead, s h, and has one block's activations at a time in the backward
pass. Beside what is kept there are, at most:

    forward        at the loss: the logits in fp32 and, if e < 4, in e bytes
    backward       at the loss: two gradients of fp32 logits, 8 V. In a block's MLP: gradients of two of its tensors
                   and of the residual stream, 2 e i + s h

Autocast (bf16 over fp32 weights) holds copies of the matrices in bf16 to the end of the forward pass, and, without
checkpointing, for the backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorapre_dist.config import ConfigError

from .request import FP32, Parameter, Request

#: In a step: when the first parameters have been gathered, at the loss in the forward and in the backward pass, in the
#: MLP of the last and of the first block in the backward pass, and when all gradients are there.
INSTANTS = {
    "gather": "forward",
    "forward": "forward",
    "loss": "backward",
    "top": "backward",
    "bottom": "backward",
    "end": "backward",
}
#: Width of a head, where the shapes do not tell how many there are: its share is a fraction of a percent.
HEAD = 64
_BLOCK = {
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
}


@dataclass(frozen=True)
class Instant:
    """One instant of a training step.

    Attributes:
        name: one of :data:`INSTANTS`.
        bytes: of activations.
        graded: elements of the parameters that have a gradient by then, where no micro-batch came before.
        cast: elements of the weights of which autocast holds copies.
    """

    name: str
    bytes: int
    graded: int
    cast: int = 0

    @property
    def moment(self) -> str:
        """``"forward"`` or ``"backward"``."""
        return INSTANTS[self.name]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Llama; elements of its parts."""

    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    layers: int
    layer: int
    down: int
    head: int
    embedding: int
    elements: int

    @property
    def matrices(self) -> int:
        """Elements of a block's matrices."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)


def shapes_of(parameters: Iterable[Parameter]) -> Shapes:
    """The sizes, from the parameters' names and shapes; of a stage that has no blocks, theirs are 0.

    Raises:
        ConfigError: it is no Llama.
    """
    blocks: dict[str, dict[str, Parameter]] = {}
    rest: dict[str, Parameter] = {}
    for p in parameters:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", p.name)
        if found:
            blocks.setdefault(found[1], {})[f"{found[2]}.{found[3]}"] = p
        else:
            rest[p.name] = p
    first: dict[str, Parameter] = next(iter(blocks.values()), {})
    nothing = Parameter("", (0, 0))
    alike = all(
        {k: p.shape for k, p in one.items()} == {k: p.shape for k, p in first.items()} for one in blocks.values()
    )
    ends = {"model.embed_tokens.weight", "lm_head.weight"} & rest.keys()
    if not alike or not (blocks or ends) or (blocks and {key.rpartition(".")[0] for key in first} != _BLOCK):
        raise ConfigError(
            "--seq_len: the formula of activations is for the blocks of Llama, which this model has not; leave it out"
        )
    embedding, head = rest.get("model.embed_tokens.weight", nothing), rest.get("lm_head.weight", nothing)
    norms = [p.shape[0] for name, p in {**rest, **first}.items() if "norm" in name]

    def side(name: str) -> int:
        return first.get(f"{name}.weight", nothing).shape[0]

    return Shapes(
        hidden=max(*norms, embedding.shape[1], head.shape[1]),
        queries=side("self_attn.q_proj"),
        keys=side("self_attn.k_proj"),
        inner=side("mlp.gate_proj"),
        vocabulary=head.shape[0] or embedding.shape[0],
        layers=len(blocks),
        layer=sum(p.numel for p in first.values()),
        down=first.get("mlp.down_proj.weight", nothing).numel,
        head=sum(p.numel for name, p in rest.items() if p is not embedding),
        embedding=embedding.numel,
        elements=sum(p.numel for one in (rest, *blocks.values()) for p in one.values()),
    )


def instants(request: Request) -> list[Instant]:
    """The instants at which a forward and backward pass may hold most.

    Without a length of sequences only those are known at which there are no activations. A stage of a pipeline holds
    what several micro-batches keep (:attr:`Request.in_flight`), and an output and a gradient that are sent, ``s h``
    each; only the last one has the loss.
    """
    if request.seq_len is None:
        return [Instant("gather", 0, 0), Instant("forward", 0, 0), Instant("end", 0, request.elements)]
    m, tokens = shapes_of(request.parameters), request.micro_batch * request.seq_len
    e, part = request.width, request.part
    stream = FP32 if request.autocast else e
    cast = (3, 2, 1) if request.autocast else (1, 1, 1)
    norms = [(FP32 + stream + e * n) * m.hidden + FP32 for n in cast]
    block = norms[0] + norms[1] + e * (2 * m.queries + 2 * m.keys + 4 * m.inner) + FP32 * (m.queries // HEAD)
    vocabulary = m.vocabulary * (part.tensor if part and request.layout.startswith("zero") else 1)
    last = part is None or part.last
    head, always = (norms[2] + FP32 * vocabulary) if last else 0, 2 * stream * HEAD + 16
    inputs = stream * m.hidden
    working = 2 * e * m.inner + stream * m.hidden
    logits = (FP32 + (e if e < FP32 else 0)) * vocabulary
    everything = m.layers * m.matrices + m.head
    if request.checkpointing:
        one, first = m.layers * inputs, block + (0 if stream == FP32 else inputs)
        top, forward, backward, cast_one = block - (inputs if stream == FP32 else 0), everything, m.head, m.matrices
    else:
        one, first, top = m.layers * block, block, 0
        forward, backward, cast_one = everything, everything, m.matrices
    kept = one * request.in_flight
    if part is not None and part.stages > 1:
        always += inputs * (request.in_flight + 1)
    if not m.layers:
        working = first = top = 0
    bottom = first + kept - one
    loss = kept + head + always
    rows = [
        Instant("gather", stream * m.hidden + kept - one, 0),
        Instant("forward", loss + (logits if last else working), 0, forward),
        Instant("loss", loss + 2 * FP32 * vocabulary, 0, backward),
        Instant("top", kept + top + working + always, m.head + m.down, cast_one if request.checkpointing else backward),
        Instant("bottom", bottom + working + always, m.elements - m.embedding - m.layer + m.down, cast_one),
        Instant("end", stream * m.hidden, m.elements, 0),
    ]
    rows = rows if last else [row for row in rows if row.name != "loss"]
    return [Instant(row.name, row.bytes * tokens, row.graded, row.cast if request.autocast else 0) for row in rows]
