"""Protocol ids with versions. A change that an old peer would misread gets a new number.

Ring: pure.
"""

from __future__ import annotations

RECORDS = "/mycel/records/1"
SESSION = "/mycel/session/1"
RING = "/mycel/ring/1"
FILES = "/mycel/files/1"
