"""Programs that measure; each prints its numbers beside their bounds, or as JSON."""
