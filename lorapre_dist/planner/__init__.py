"""Memory per rank and bytes sent per step for any world size, without devices: ``lorapre plan``."""

from .optimizers import OPTIMIZERS
from .plan import PARTS, Usage, plan, smallest_world
from .request import LAYOUTS, Parameter, Request, Zero

__all__ = ["LAYOUTS", "OPTIMIZERS", "PARTS", "Parameter", "Request", "Usage", "Zero", "plan", "smallest_world"]
