"""The old place of :mod:`lorapre_dist.integrations.huggingface.accelerate`, for one version."""

import warnings

from lorapre_dist.integrations.huggingface.accelerate import *  # noqa: F403

warnings.warn(
    "lorapre_dist.training.hf_accelerate is now lorapre_dist.integrations.huggingface.accelerate",
    FutureWarning,
    stacklevel=2,
)
