"""Searches step schedules: NSGA-II over what is done with each step, error against cost."""

from diffratio.search.run import search
from diffratio.search.settings import SearchSettings

__all__ = ["SearchSettings", "search"]
