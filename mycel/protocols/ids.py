"""Protocol ids with versions. A change that an old peer would misread gets a new number.

Ring: pure.
"""

from __future__ import annotations

RECORDS = "/mycel/records/1"
SESSION = "/mycel/session/2"
RING = "/mycel/ring/2"
HANDOVER = "/mycel/handover/1"
REACH = "/mycel/reach/1"
FILES = "/mycel/files/1"
PING = "/mycel/ping/1"
TRAIN = "/mycel/train/1"
PIPE = "/mycel/pipe/1"
REDUCE = "/mycel/reduce/1"
STATE = "/mycel/state/1"
ROUND = "/mycel/round/1"
BLOBS = "/mycel/blobs/1"
