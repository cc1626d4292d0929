"""What of a model the optimizer keeps low-rank state of and what takes AdamW: rows of the table at the start."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from lorapre_dist.config.param_groups import clean_name, is_table_or_head, layer_kinds, shape_of
from lorapre_dist.optimizers import LowRankOptimizer

#: The share of parameters, embeddings and heads apart, above which AdamW's state is warned of.
WARN_ABOVE = 0.1
_SHOWN = 3


def rows(model: Any, optimizer: Any) -> list[str]:
    """One row, or two if much is not low-rank; none for an optimizer that is not ours."""
    if not isinstance(optimizer, LowRankOptimizer):
        return []
    low_rank, kinds, apart, sizes = optimizer.low_rank_names(model), layer_kinds(model), 0, Counter[str]()
    named = [(clean_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    total = sum(math.prod(shape_of(p)) for _, p in named)
    for name, p in named:
        if name in low_rank:
            continue
        if kinds.get(name) in ("embedding", "head") or is_table_or_head(name):
            apart += math.prod(shape_of(p))
        else:
            vector = len(shape_of(p)) < 2
            sizes["norms and biases" if vector else re.sub(r"\.\d+(?=\.)", ".*", name)] += math.prod(shape_of(p))
    share = sum(sizes.values()) / total
    adamw = f"embeddings and heads {apart / total:.1%}" + (
        f", {share:.1%} else: {_largest(sizes, total)}" * bool(sizes)
    )
    of = {"adamw8bit": "AdamW in 8 bits (vectors: in fp32)", "adafactor": "Adafactor (vectors: AdamW)"}
    kept = of.get(optimizer.config.other_state, "AdamW")
    found = [f"low-rank   {1 - apart / total - share:.1%} of the trained parameters; {kept}: {adamw}"]
    if share > WARN_ABOVE:
        found.append(
            f"warning    {share:.0%} of the trained parameters, embeddings and heads apart, take AdamW and its state: "
            f"they are in no numbered block, or narrower than rank={optimizer.config.rank}; "
            "optimizer.params.target_modules selects by name"
        )
    return found


def _largest(sizes: Counter[str], total: int) -> str:
    shown = [f"{name} {size / total:.1%}" for name, size in sizes.most_common(_SHOWN)]
    return ", ".join(shown) + (f", {len(sizes) - _SHOWN} more" if len(sizes) > _SHOWN else "")
