"""What is sent along the axes beside data parallelism: activations and their gradients, of Llama's blocks.

A tensor has ``b s h`` numbers of e bytes: tokens of a micro-batch times the hidden size. For each micro-batch

    tensor     (T ranks) all-reduces of such a tensor: forward 2 a block, after ``o_proj`` and ``down_proj``; backward 5
               a block, for the input of each of the other projections; with checkpointing the first 2 again. DeepSpeed
               splits the head as well: 1 backward, and its logits are gathered, ``b s V``
    pipeline   each stage but the last sends one to the next, each but the first one back. Where T ranks hold the same,
               DeepSpeed sends a T-th from each, which they gather along the tensor axis: what comes from the stage
               before, and for the backward pass what comes back from the next one and the output that went there
"""

from __future__ import annotations

from .activations import shapes_of
from .request import Part, Request

#: The axis along which the framework sends what is sent for this purpose; data parallelism for all others.
AXES = {
    "all-reduce activations": "tensor",
    "all-gather logits": "tensor",
    "all-gather activations": "tensor",
    "send activations": "pipeline",
    "send gradients": "pipeline",
}


def axis_of(purpose: str) -> str:
    """The axis along which the framework sends something."""
    return AXES.get(purpose, "data")


def sent(request: Request) -> dict[str, int]:
    """Bytes by purpose that a rank sends in a step along the tensor and the pipeline axis; see :data:`AXES`.

    Without a length of sequences nothing is known of activations.
    """
    part, n = request.part or Part(), request.tensor
    if request.seq_len is None or (n == 1 and part.stages == 1):
        return {}
    m, passes = shapes_of(request.local.parameters), request.accumulation
    one = request.width * request.micro_batch * request.seq_len * m.hidden
    found, engine = {}, request.layout.startswith("zero")
    if n > 1:
        times = m.layers * (9 if request.checkpointing else 7) + (engine and part.last)
        found["all-reduce activations"] = passes * times * round(one * 2 * (n - 1) / n)
        if engine and part.last:
            logits = one // m.hidden * m.vocabulary * n  # this rank's part of the vocabulary, times n
            found["all-gather logits"] = passes * round(logits * (n - 1) / n)
    sliced = n if engine else 1
    piece = -(-one // sliced) + (8 * (n + 7) if sliced > 1 else 0)  # with the whole's shape, and where parts begin
    arriving = (part.stage > 0) + 2 * (not part.last)
    if not part.last:
        found["send activations"] = passes * piece
    if part.stage > 0:
        found["send gradients"] = passes * piece
    if sliced > 1 and arriving:
        found["all-gather activations"] = passes * arriving * round(one * (n - 1) / n)
    return found
