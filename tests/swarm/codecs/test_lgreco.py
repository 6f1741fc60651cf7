"""The chooser: never more error than the default everywhere, and fewer bytes where layers are unlike."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.swarm.codecs import Layout, make_codec
from mycel.swarm.codecs.lgreco import Cost, choose, measure

costs = st.builds(Cost, st.integers(1, 100), st.floats(0, 10))
tables = st.lists(st.fixed_dictionaries({"a": costs, "b": costs, "c": costs}), min_size=1, max_size=4)


def total(tables, specs) -> Cost:
    chosen = [table[spec] for table, spec in zip(tables, specs, strict=True)]
    return Cost(sum(one.size_bytes for one in chosen), sum(one.squared_error for one in chosen))


@given(tables)
def test_no_worse_than_the_default_and_as_short_as_can_be(tables):
    default, found = total(tables, ["a"] * len(tables)), total(tables, choose(tables, "a"))
    assert found.squared_error <= default.squared_error * (1 + 1e-12)
    assert found.size_bytes <= default.size_bytes
    # The best of all combinations with an error that rounding up to steps cannot push beyond the bound.
    room = default.squared_error * (1 - 2 * len(tables) / 4096)
    every = [total(tables, specs) for specs in product("abc", repeat=len(tables))]
    shortest = min((one.size_bytes for one in every if one.squared_error < room), default=default.size_bytes)
    assert found.size_bytes <= shortest


def test_the_example() -> None:
    small, large = {"int8": Cost(8, 1.0), "int4": Cost(4, 9.0)}, {"int8": Cost(80, 0.1), "int4": Cost(40, 0.9)}
    assert choose([small, large], "int8") == ("int8", "int8")
    small["float16"] = Cost(16, 0.0)
    assert choose([small, large], "int8") == ("float16", "int4")
    with pytest.raises(ValueError, match="cost of e3m0"):
        choose([small, large], "e3m0")


def unlike_layers() -> tuple[torch.Tensor, Layout]:
    """Layers whose norms and spectra differ by far, as those of a transformer do: embeddings, attention, MLP, norms."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(((400, 64), (64, 64), (64, 64), (256, 64), (64, 256), (64,), (128, 128), (200, 100)))
    scales = (0.02, 1.0, 0.3, 0.05, 0.1, 3.0, 0.01, 0.5)
    decays = (0.0, 1.5, 1.0, 0.3, 0.5, 0.0, 0.0, 2.0)
    layers = []
    for shape, scale, decay in zip(layout.shapes, scales, decays, strict=True):
        layer = torch.randn(shape, generator=generator)
        if len(shape) > 1 and decay:
            left, strengths, right = torch.linalg.svd(layer, full_matrices=False)
            layer = left * (strengths * torch.arange(1, len(strengths) + 1) ** -decay) @ right
        layers.append(layer.reshape(-1) * scale)
    return torch.cat(layers), layout


@pytest.mark.parametrize("default", ["topk:0.03125", "int4", "powersgd:4"])
def test_fewer_bytes_at_equal_error_on_layers_of_unlike_spectra(default: str) -> None:
    x_P, layout = unlike_layers()
    families = {
        "topk:0.03125": [f"topk:{2.0**-i}" for i in range(1, 10)],
        "int4": [f"int{bits}" for bits in range(2, 9)],
        "powersgd:4": [f"powersgd:{rank}" for rank in (1, 2, 3, 4, 6, 8, 12, 16)],
    }
    tables = measure(x_P, layout, families[default])
    specs = choose(tables, default)
    uniform, chosen = total(tables, [default] * len(specs)), total(tables, specs)
    assert chosen.squared_error <= uniform.squared_error
    assert chosen.size_bytes <= 0.8 * uniform.size_bytes
    # What was promised is what is sent.
    codec = make_codec("mixed:" + "|".join(specs))
    body = codec.encoder(layout).encode(x_P, b"")
    assert len(body) == chosen.size_bytes + 4 * len(specs)
    lost_P = (codec.decode(body, layout) - x_P).double()
    assert float(lost_P @ lost_P) == pytest.approx(chosen.squared_error, rel=1e-6)
