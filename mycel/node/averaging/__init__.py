"""Averaging tensors with whoever is in the group: see averager.py, and sync.py for code without trio.

Ring: shell.
"""

from mycel.node.averaging.averager import Averaged, Averager
from mycel.node.averaging.charter import AverageOptions
from mycel.node.averaging.sync import SyncAverager

__all__ = ["AverageOptions", "Averaged", "Averager", "SyncAverager"]
