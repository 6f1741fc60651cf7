"""Hostile bytes, for a bounded time: `make fuzz FUZZ_SECONDS=600` searches longer."""
