"""One suite of checks for each port; the simulated and the real adapter both run it."""

import pytest

# The checks live outside of test files: without this their failing asserts would not show what they compared.
pytest.register_assert_rewrite(
    "tests.conformance.compute_suite",
    "tests.conformance.peer_checks",
    "tests.conformance.record_store_suite",
    "tests.conformance.stream_checks",
    "tests.conformance.transport_rig",
)
