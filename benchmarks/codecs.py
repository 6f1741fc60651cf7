"""Update codecs: bits a number, what is lost, and how fast, on one core.

    python -m benchmarks.codecs [SPEC ...] [--elements 1000000] [--rounds 3] [--json]

Each codec encodes and decodes a vector as an update of a transformer is laid out: matrices, and a few vectors. "normal"
are normal numbers; "heavy" are normal numbers over normal numbers, cut at a thousand, as sparse gradients are. The
error is |x' - x| / |x| of the first update; with error feedback the rest follows later. Speeds are of float32 bytes of
the vector, the best of the rounds. dgc is shown behind its warm-up. "choice" is the per-layer chooser: the bytes it
needs against those of one codec for all layers at no more squared error in total, on layers whose spectra differ.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mycel.swarm.codecs import Layout, make_codec
from mycel.swarm.codecs.lgreco import choose, measure

SPECS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "int4:stochastic",
    "int2",
    "e3m0",
    "e3m0+zip",
    "topk:0.1",
    "topk:0.01",
    "topk:0.01,values=int8",
    "topk:0.015625,values=int2",
    "topk:0.01,values=sign",
    "topk:0.001",
    "dgc:0.001,warmup=0",
    "powersgd:2",
    "powersgd:8",
    "dct:32",
    "dct:4,sign",
    "kmeans:3",
    "kmeans:15",
    "kmeans:15,keep=1",
)
FAMILIES = {
    "topk:0.03125": [f"topk:{2.0**-i}" for i in range(1, 10)],
    "int4": [f"int{bits}" for bits in range(2, 9)],
    "powersgd:4": [f"powersgd:{rank}" for rank in (1, 2, 3, 4, 6, 8, 12, 16)],
}


def layout_of(n_elements: int) -> Layout:
    """About so many elements: layers of matrices of 512 columns and their norms."""
    rows = max(4, n_elements // 512)
    quarter = rows // 4
    return Layout(((quarter, 512), (512,), (quarter, 512), (512,), (rows - 2 * quarter - 2, 512)))


def vector(layout: Layout, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    above_P = torch.randn(layout.n_elements, generator=generator)
    if kind == "normal":
        return above_P * 1e-3
    return (above_P / torch.randn(layout.n_elements, generator=generator)).clamp_(-1000, 1000) * 1e-3


def best_s(call: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def measured(spec: str, layout: Layout, rounds: int) -> dict[str, Any]:
    codec = make_codec(spec)
    row: dict[str, Any] = {"codec": codec.name}
    for kind in ("normal", "heavy"):
        x_P = vector(layout, kind)
        body = codec.encoder(layout).encode(x_P, b"seed")
        found_P = codec.decode(body, layout)
        row[f"{kind}_bits"] = 8 * len(body) / layout.n_elements
        row[f"{kind}_error"] = float((found_P - x_P).norm() / x_P.norm())
    # A fresh encoder each time: the state that an encoder allocates once is not what is measured.
    encoders = [codec.encoder(layout) for _ in range(rounds)]
    mega_bytes = 4 * layout.n_elements / 1e6
    row["encode_MB_s"] = mega_bytes / best_s(lambda: encoders.pop().encode(x_P, b"seed"), rounds)
    row["decode_MB_s"] = mega_bytes / best_s(lambda: codec.decode(body, layout), rounds)
    return row


def unlike_layers() -> tuple[Tensor, Layout]:
    """Layers whose norms and spectra differ by far: singular values that fall as i^-decay."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(((1000, 128), (128, 128), (128, 128), (512, 128), (128, 512), (128,), (256, 256), (400, 200)))
    scales = (0.02, 1.0, 0.3, 0.05, 0.1, 3.0, 0.01, 0.5)
    decays = (0.0, 1.5, 1.0, 0.3, 0.5, 0.0, 0.0, 2.0)
    layers = []
    for shape, scale, decay in zip(layout.shapes, scales, decays, strict=True):
        layer = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            left, strengths, right = torch.linalg.svd(layer, full_matrices=False)
            layer = left * (strengths * torch.arange(1, len(strengths) + 1) ** -decay) @ right
        layers.append(layer.reshape(-1) * scale)
    return torch.cat(layers), layout


def choices() -> list[dict[str, Any]]:
    x_P, layout = unlike_layers()
    found = []
    for default, candidates in FAMILIES.items():
        tables = measure(x_P, layout, candidates)
        specs = choose(tables, default)
        uniform = [table[default] for table in tables]
        chosen = [table[spec] for table, spec in zip(tables, specs, strict=True)]
        found.append(
            {
                "default": default,
                "bytes_share": sum(one.size_bytes for one in chosen) / sum(one.size_bytes for one in uniform),
                "error_share": sum(one.squared_error for one in chosen) / sum(one.squared_error for one in uniform),
                "specs": specs,
            }
        )
    return found


def show(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> None:
    print(f"{'':28} {'normal':>16} {'heavy':>16} {'encode':>8} {'decode':>8}")
    print(f"{'codec':28} {'bits':>8} {'error':>7} {'bits':>8} {'error':>7} {'MB/s':>8} {'MB/s':>8}")
    for row in rows:
        shown = " ".join(f"{row[f'{kind}_bits']:8.4f} {row[f'{kind}_error']:7.4f}" for kind in ("normal", "heavy"))
        print(f"{row['codec']:28} {shown} {row['encode_MB_s']:8.0f} {row['decode_MB_s']:8.0f}")
    for one in found:
        shares = f"{one['bytes_share']:.2f} of the bytes at {one['error_share']:.3f} of the error"
        print(f"choice against {one['default']}: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layout = layout_of(options.elements)
    rows = [measured(spec, layout, options.rounds) for spec in options.specs or SPECS]
    found = [] if options.specs else choices()
    if options.json:
        print(json.dumps({"elements": layout.n_elements, "codecs": rows, "choices": found}))
    else:
        show(rows, found)


if __name__ == "__main__":
    main()
