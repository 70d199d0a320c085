"""The learned part: routers, keep ratios, keep schedules."""

from diffratio.routing.ratios import KeepRatios
from diffratio.routing.router import TokenRouter
from diffratio.routing.schedule import KeepSchedule

__all__ = ["KeepRatios", "KeepSchedule", "TokenRouter"]
