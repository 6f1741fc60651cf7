"""Tests of mycel/security/aggregators."""
