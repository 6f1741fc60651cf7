"""What is read from a model directory, and one clear line for everything that can be wrong with one."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.node import weights_map
from mycel.node.architectures import ARCHITECTURES, refusal, unit_of
from mycel.node.model_info import inspect_model, span_bytes, span_tensors
from mycel.node.weights_map import read_tensor_entries
from mycel.protocols.errors import ConfigError
from tests.tiny_models import MORE_TINY_ARCHITECTURES, TINY_ARCHITECTURES, make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("info") / "tiny-llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _header(directory: Path) -> tuple[dict[str, Any], bytes]:
    data = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(directory: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_a_llama_is_described(llama: Path) -> None:
    info = inspect_model(llama)
    assert (info.name, info.architecture, info.n_blocks) == ("tiny-llama", "llama", 4)
    assert (info.hidden_size, info.vocab_size, info.max_positions) == (32, 260, 256)
    assert (info.dtype, info.tied_embeddings, info.eos_token_ids) == ("float32", False, (257,))
    assert info.embed_bytes == 4 * 260 * 32
    assert info.head_bytes == 4 * (260 * 32 + 32)
    attention, feed_forward = 2 * 32 * 32 + 2 * 16 * 32, 3 * 48 * 32
    assert info.block_bytes == (4 * (attention + feed_forward + 2 * 32),) * 4
    assert info.kv_bytes_per_token == (4 * 2 * 2 * 8,) * 4
    assert len(info.tensors["block.3"]) == 9


def test_units_cover_the_file(llama: Path) -> None:
    info = inspect_model(llama)
    entries = [entry for unit in info.tensors.values() for entry in unit]
    assert sorted(entry.name for entry in entries) == sorted(read_tensor_entries(llama))
    _, data = _header(llama)
    assert sum(entry.size_bytes for entry in entries) == len(data)
    assert span_bytes(info, 0, 4) == len(data)
    assert span_bytes(info, 0, 1) + span_bytes(info, 1, 3) + span_bytes(info, 3, 4) == len(data)
    assert set(span_tensors(info, 1, 3)) == {"block.1", "block.2"}


def test_every_architecture_of_the_table_has_a_tested_model(tmp_path: Path) -> None:
    made = set()
    for name in (*TINY_ARCHITECTURES, *MORE_TINY_ARCHITECTURES):
        info = inspect_model(make_tiny_model(name, tmp_path / name))
        made.add(info.architecture)
        assert info.n_blocks == 4
    assert made == set(ARCHITECTURES)


def test_ends_of_text_come_from_both_files(copy: Path) -> None:
    _edit_config(copy, eos_token_id=[7, 257])
    (copy / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert inspect_model(copy).eos_token_ids == (7, 9, 257)


def test_a_tied_model_whose_file_has_a_head_of_its_own_uses_it(copy: Path) -> None:
    """As transformers does: what the checkpoint holds counts more than what the configuration says."""
    _edit_config(copy, tie_word_embeddings=True)
    assert not inspect_model(copy).tied_embeddings


def _remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def _remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _garble_config(directory: Path) -> None:
    (directory / "config.json").write_text("{not json")


def _config_is_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def _remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def _huge_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**40))


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"\x80\x02}q\x00." + b"\0" * 40)


def _wrong_size(directory: Path) -> None:
    header, data = _header(directory)
    header["model.norm.weight"]["shape"] = [31]
    _write(directory, header, data)


def _strange_dtype(directory: Path) -> None:
    header, data = _header(directory)
    header["model.norm.weight"]["dtype"] = "F8_E4M3"
    _write(directory, header, data)


def _missing_block(directory: Path) -> None:
    header, data = _header(directory)
    _write(directory, {name: value for name, value in header.items() if ".layers.2." not in name}, data)


def _missing_head(directory: Path) -> None:
    header, data = _header(directory)
    header.pop("lm_head.weight")
    _write(directory, header, data)


def _unknown_tensor(directory: Path) -> None:
    header, data = _header(directory)
    header["vision_tower.patch.weight"] = header["model.norm.weight"]
    _write(directory, header, data)


def _index_to_nowhere(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_out_of_the_directory(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_of_an_absent_tensor(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    index = {"weight_map": {"model.other.weight": "model-1.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_directory, "there is no model directory"),
        (_remove_config, "has no config.json"),
        (_garble_config, "config.json is damaged: not valid JSON"),
        (_config_is_a_list, "config.json is damaged: not a JSON object"),
        (_remove_weights, "holds no model.safetensors"),
        (_truncate, "is truncated"),
        (_empty, "is damaged: truncated, or not a safetensors file"),
        (_huge_header, "is damaged: truncated, or not a safetensors file"),
        (_pickle, "its header is not one of a safetensors file"),
        (_wrong_size, "does not have the size that its shape says"),
        (_strange_dtype, "has dtype F8_E4M3, which is not supported"),
        (_missing_block, "its checkpoint has no tensor of block.2"),
        (_missing_head, r"has no output projection \(lm_head\)"),
        (_unknown_tensor, "'vision_tower.patch.weight' belongs to no part that is known"),
        (_index_to_nowhere, "names model-00001-of-00002.safetensors, which is not there"),
        (_index_out_of_the_directory, "is in no safetensors file beside it"),
        (_index_of_an_absent_tensor, "lacks tensor 'model.other.weight'"),
    ],
)
def test_a_damaged_directory_gets_one_line(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ConfigError, match=message) as caught:
        inspect_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "nonesuch"}, "architecture 'nonesuch' is not known to transformers"),
        ({"model_type": "t5"}, "is not a causal language model"),
        ({"model_type": "mamba"}, "its blocks keep a recurrent state"),
        ({"model_type": "mamba", "num_attention_heads": 0}, "has no attention heads"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"weights are quantised \(gptq\)"),
        ({"layer_types": ["linear_attention"] * 4}, "has blocks of kind 'linear_attention'"),
        ({"text_config": {"hidden_size": 4}}, "is a multimodal model"),
        ({"num_kv_shared_layers": 2}, "shares keys and values between blocks"),
        ({"num_hidden_layers": 0}, "not valid for llama: 0 blocks"),
        ({"num_hidden_layers": "many"}, "is not valid for llama"),
        ({"num_hidden_layers": 5}, "has no tensor of block.4"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_the_reason(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    _edit_config(copy, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        inspect_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        # Scales the embedding in its base model's forward, unless the factor is 1: seen by passing a probe through it.
        ("granitemoe", {"embedding_multiplier": 3.0}, "changes the hidden state outside of its blocks"),
        ("granitemoe", {"embedding_multiplier": 1.0}, None),
        ("nanochat", {}, "does not end with one final norm"),
        ("gpt_neo", {"num_layers": 4, "attention_types": [[["global"], 4]], "num_heads": 4}, "more than embedding"),
        ("opt", {}, "lists of 4 blocks where one is needed"),
        ("olmo", {}, None),
    ],
)
def test_an_untested_architecture_is_tried_on_its_structure(
    copy: Path, model_type: str, fields: dict[str, Any], message: str | None
) -> None:
    assert model_type not in ARCHITECTURES
    _edit_config(copy, model_type=model_type, num_local_experts=4, num_experts_per_tok=2, **fields)
    if message is None:
        assert inspect_model(copy).architecture == model_type
        return
    with pytest.raises(ConfigError, match=message) as caught:
        inspect_model(copy)
    assert "\n" not in str(caught.value)


def test_headers_are_limited_before_they_are_parsed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_map, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ConfigError, match="over the limit of 100"):
        inspect_model(copy)
    monkeypatch.undo()
    monkeypatch.setattr(weights_map, "MAX_TENSORS", 10)
    with pytest.raises(ConfigError, match="39 tensors, over the limit of 10"):
        inspect_model(copy)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n))), st.data())
def test_any_bytes_are_tensors_or_a_config_error(tmp_path: Path, prefix: bytes, data: st.DataObject) -> None:
    body = data.draw(
        st.one_of(
            st.just(b""),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["F32", "dtype", "shape"]),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner)
                ),
                max_leaves=8,
            ).map(lambda value: struct.pack("<Q", len(json.dumps(value))) + json.dumps(value).encode()),
        )
    )
    (tmp_path / "model.safetensors").write_bytes(body or prefix)
    with contextlib.suppress(ConfigError):
        entries = read_tensor_entries(tmp_path)
        assert all(entry.offset + entry.size_bytes <= entry.file.stat().st_size for entry in entries.values())


def test_names_of_real_checkpoints_find_their_unit() -> None:
    expected = {
        "gpt_neox.layers.11.attention.dense.bias": "block.11",
        "gpt_neox.layers.11.attention.masked_bias": "",
        "h.3.attn.bias": "",
        "h.3.attn.c_attn.bias": "block.3",
        "transformer.wpe.weight": "embed",
        "word_embeddings_layernorm.bias": "embed",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "",
        "model.layers.31.block_sparse_moe.experts.7.w2.weight": "block.31",
        "model.norm.weight": "head",
        "transformer.ln_f.bias": "head",
        "gpt_neox.final_layer_norm.weight": "head",
        "embed_out.weight": "head",
        "score.weight": None,
    }
    assert {name: unit_of(name) for name in expected} == expected


def test_a_plain_configuration_is_not_refused() -> None:
    assert refusal({"model_type": "llama", "num_attention_heads": 4, "layer_types": ["full_attention"]}) is None


def test_the_tiny_tokenizer_is_one_of_bytes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_tokenizer(tmp_path / "tokenizer"))
    ids = tokenizer.encode("Grüße, 世界\n")
    assert len(ids) == len("Grüße, 世界\n".encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == "Grüße, 世界\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
