"""Memory per rank and bytes sent per step for any world size, without devices: ``lorapre plan``."""

from .plan import MOMENTS, PARTS, Usage, names, plan, smallest_world
from .request import LAYOUTS, Parameter, Request, Zero

__all__ = ["LAYOUTS", "MOMENTS", "PARTS", "Parameter", "Request", "Usage", "Zero", "names", "plan", "smallest_world"]
