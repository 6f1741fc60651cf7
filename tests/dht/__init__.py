"""Tests of the room `dht`."""
