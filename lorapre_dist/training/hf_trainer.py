"""The old place of :mod:`lorapre_dist.integrations.huggingface.trainer`, for one version."""

import warnings

from lorapre_dist.integrations.huggingface.trainer import *  # noqa: F403

warnings.warn(
    "lorapre_dist.training.hf_trainer is now lorapre_dist.integrations.huggingface.trainer", FutureWarning, stacklevel=2
)
