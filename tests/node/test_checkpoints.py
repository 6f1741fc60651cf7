"""Checkpoints: what others load, what is read back, races, crashes, damage and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import trio
import trio.testing

from mycel.node.model_info import inspect_model
from mycel.node.model_manifest import build_manifest
from mycel.node.span import Span
from mycel.node.training import checkpoint_bytes
from mycel.node.training.checkpoint_layout import StageFiles, safetensors_header, version_of
from mycel.node.training.checkpoints import (
    Checkpointer,
    CheckpointPlace,
    complete,
    is_due,
    missing_parts,
    newest,
    on_thread,
    read_part,
    read_stage,
    write_part,
)
from mycel.node.training.optimizer import FlatState
from mycel.node.training.stage import TorchStage
from mycel.protocols.errors import ConfigError
from mycel.protocols.ports import Done
from mycel.swarm.training.plan import RunPlan
from mycel.swarm.training.recipe import BorderPart, CheckpointPart, OptimizerPart, Recipe, SchedulePart
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

RUN = hashlib.sha256(b"a run").digest()
RECIPE = hashlib.sha256(b"a recipe").digest()
ROOT = Path(__file__).resolve().parents[2]
N_BLOCKS = 2


# ---- stages by hand


@dataclass(frozen=True)
class Stage:
    """A stage's files and flat parameters, decayed tensors first."""

    files: StageFiles
    params: torch.Tensor
    decay_end: int

    def state(self) -> FlatState:
        return FlatState(self.params.clone(), self.decay_end, OptimizerPart(), SchedulePart(), 100)


def names_of(model_dir: Path, stage: int, n_stages: int) -> list[str]:
    """The tensors of a stage: even blocks, the table on both ends if it is tied."""
    info = inspect_model(model_dir)
    bounds = [info.n_blocks * i // n_stages for i in range(n_stages + 1)]
    units = [f"block.{i}" for i in range(bounds[stage], bounds[stage + 1])]
    units = [*(["embed"] if stage == 0 else []), *units, *(["head"] if stage == n_stages - 1 else [])]
    names = [entry.name for unit in units for entry in info.tensors[unit]]
    if info.tied_embeddings and stage == n_stages - 1 and stage > 0:
        names.append(info.tensors["embed"][0].name)
    return names


def make_stage(model_dir: Path, stage: int, n_stages: int, *, bottleneck: bool = False) -> Stage:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tensors = {name: model.state_dict()[name] for name in names_of(model_dir, stage, n_stages)}
    if bottleneck:
        tensors["mycel.bottleneck.up.weight"] = torch.randn(3, 4, generator=torch.Generator().manual_seed(stage))
    tied_name = next((name for name in tensors if "wte" in name), None) if n_stages > 1 else None
    ordered = sorted(tensors, key=lambda name: tensors[name].dim() < 2)
    entries, at, tied, decay_end = [], 0, None, 0
    for name in ordered:
        end = at + tensors[name].numel()
        entries.append((name, at, end, tuple(tensors[name].shape)))
        if name == tied_name:
            tied = (at, end)
        if tensors[name].dim() >= 2:
            decay_end = end
        at = end
    # The files do not care for the order in which they are told.
    files = StageFiles(stage, n_stages, tuple(reversed(entries)), tied)
    return Stage(files, torch.cat([tensors[name].detach().reshape(-1) for name in ordered]), decay_end)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """A tiny model's directory by its architecture, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = make_tiny_tokenizer(make_tiny_model(name, directory, N_BLOCKS))
            (directory / "recipe.toml").write_text('name = "x"\n')
        return made[name]

    return make


@pytest.fixture
def place(tmp_path, models) -> CheckpointPlace:
    return CheckpointPlace(tmp_path / "checkpoints", models("llama"), RUN, RECIPE, keep=2)


def toy_stages(n_stages: int = 2, size: int = 500) -> list[StageFiles]:
    """Stages of a model that only has to have names, with a tied table."""
    stages = []
    for k in range(n_stages):
        tensors = [("table", 0, 60, (20, 3))] if k in (0, n_stages - 1) else []
        at = 60 if tensors else 0
        tensors += [(f"w.{k}", at, at + size, (size,)), (f"mycel.b.{k}", at + size, at + size + 4, (2, 2))]
        stages.append(StageFiles(k, n_stages, tuple(tensors), (0, 60) if at and n_stages > 1 else None))
    return stages


def toy_snapshot(stage: StageFiles, version: int, moments: int = 2) -> memoryview:
    """Equal for every peer of the stage; both ends have the same table."""
    generator = torch.Generator().manual_seed(version * 100 + stage.index)
    flat = torch.randn((1 + moments) * stage.n_elements, generator=generator)
    if stage.tied is not None:
        flat[stage.tied[0] : stage.tied[1]] = torch.arange(60) * 0.5 + version
    return memoryview(bytearray(flat.numpy().tobytes()))


def write_all(place: CheckpointPlace, version: int, stages: list[StageFiles] | None = None) -> None:
    stages = toy_stages() if stages is None else stages
    for stage in stages:
        write_part(place, version, stage, toy_snapshot(stage, version))
    assert complete(place, version, len(stages)) == {}


def folders(place: CheckpointPlace) -> list[str]:
    return sorted(path.name for path in place.directory.iterdir())


def found_version(place: CheckpointPlace) -> int | None:
    found = newest(place.directory, place.run).checkpoint
    return None if found is None else found.version


# ---- what others load


@pytest.mark.parametrize(("name", "n_stages"), [("llama", 2), ("gpt2", 2), ("gpt2", 1), ("llama", 1)])
def test_transformers_and_a_span_load_what_was_trained(models, tmp_path, name, n_stages):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = CheckpointPlace(tmp_path, models(name), RUN, RECIPE, keep=1)
    expected = AutoModelForCausalLM.from_pretrained(models(name)).state_dict()
    for k in range(n_stages):
        stage = make_stage(models(name), k, n_stages, bottleneck=True)
        state = stage.state()
        state.apply(torch.full_like(stage.params, 0.5), 1.0)
        for tensor, start, end, shape in stage.files.tensors:
            # The table, at both ends, is trained in the same way.
            flat = torch.frombuffer(state.snapshot(), dtype=torch.float32)[start:end]
            if tensor in expected:
                expected[tensor] = flat.view(shape)
        write_part(place, 100, stage.files, state.snapshot())
    assert complete(place, 100, n_stages) == {}
    folder = tmp_path / "step-00000100"

    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = {tensor for k in range(n_stages) for tensor in names_of(models(name), k, n_stages)}
    assert trained <= loaded.state_dict().keys()
    for tensor in trained:
        assert torch.equal(loaded.state_dict()[tensor], expected[tensor]), tensor
    assert AutoTokenizer.from_pretrained(folder)("ab") == AutoTokenizer.from_pretrained(models(name))("ab")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"

    ids = torch.tensor([7, 3, 99])
    span = Span.load(folder, 0, N_BLOCKS)
    logits_TV = span.logits(span.forward(ids, span.new_cache()))
    torch.testing.assert_close(logits_TV, loaded(ids[None]).logits[0].detach(), rtol=1e-5, atol=1e-5)
    manifest, _ = build_manifest(folder, tmp_path / "cache")
    assert {"config.json", "tokenizer.json"} <= {file.name for file in manifest.files}
    assert "recipe.toml" not in {file.name for file in manifest.files}
    assert (folder / "training" / "recipe.toml").read_text() == 'name = "x"\n'


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mixtral", "deepseek_v3"])
def test_a_real_stage_is_written_as_others_name_its_tensors(tmp_path, name):
    """Fused experts and a router's bias among them: the parts that stages hold make the model that they came from."""
    from transformers import AutoModelForCausalLM

    model_dir = make_tiny_model(name, tmp_path / "model", N_BLOCKS)
    plan = RunPlan(RUN, ((0, 1), (1, N_BLOCKS)), n_steps=9, n_microbatches=1, n_sequences=1, n_tokens=4)
    recipe = Recipe("x", border=BorderPart(bottleneck="linear"), stages=2)
    place = CheckpointPlace(tmp_path / "checkpoints", model_dir, RUN, RECIPE, keep=1)
    stages = [TorchStage.load(model_dir, plan, k, recipe) for k in range(2)]
    for stage in stages:
        state = FlatState(stage.params_P, stage.decay_end, recipe.optimizer, recipe.schedule, 9)
        write_part(place, 3, StageFiles(stage.index, 2, stage.tensors, stage.tied), state.snapshot())
    assert complete(place, 3, 2) == {}

    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    loaded, info = AutoModelForCausalLM.from_pretrained(place.whole(3), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())
    span = Span.load(place.whole(3), 0, N_BLOCKS)
    ids = torch.tensor([7, 3, 99])
    logits_TV = span.logits(span.forward(ids, span.new_cache()))
    torch.testing.assert_close(logits_TV, loaded(ids[None]).logits[0].detach(), rtol=1e-5, atol=1e-5)


def test_weights_that_were_trained_in_float32_are_not_rounded_when_they_are_loaded(tmp_path):
    from transformers import AutoModelForCausalLM

    model_dir = make_tiny_model("llama", tmp_path / "model", N_BLOCKS, dtype="bfloat16")
    place = CheckpointPlace(tmp_path / "checkpoints", model_dir, RUN, RECIPE, keep=1)
    stage = make_stage(model_dir, 0, 1)
    stage.params.add_(1e-4)
    write_part(place, 1, stage.files, stage.state().snapshot())
    assert complete(place, 1, 1) == {}
    loaded = AutoModelForCausalLM.from_pretrained(place.whole(1)).state_dict()
    for name, start, end, shape in stage.files.tensors:
        assert torch.equal(loaded[name], stage.params[start:end].view(shape))


# ---- what is read back


@pytest.mark.parametrize("moments", [0, 1, 2])
@pytest.mark.parametrize("n_stages", [1, 2, 3])
def test_a_stage_is_read_as_it_was_written(place, n_stages, moments):
    for stage in toy_stages(n_stages):
        write_part(place, 7, stage, toy_snapshot(stage, 7, moments))
    complete(place, 7, n_stages)
    checkpoint = newest(place.directory, RUN).checkpoint
    assert checkpoint is not None
    for stage in toy_stages(n_stages):
        version, snapshot = read_stage(checkpoint, stage)
        assert version == 7
        assert snapshot == toy_snapshot(stage, 7, moments)


def test_the_shared_table_is_written_once_and_read_by_both(place):
    write_all(place, 7)
    header = safetensors_header(toy_stages()[1].weights())
    assert b"table" not in header
    index = json.loads((place.whole(7) / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "table": "model-00001-of-00002.safetensors",
        "w.0": "model-00001-of-00002.safetensors",
        "w.1": "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(models, tmp_path, name):
    place = CheckpointPlace(tmp_path, models(name), RUN, RECIPE, keep=1)
    stages = [make_stage(models(name), k, 2) for k in range(2)]

    def gradient(stage: Stage, version: int) -> torch.Tensor:
        grad_P = torch.randn(stage.params.numel(), generator=torch.Generator().manual_seed(version))
        if stage.files.tied is not None:
            # Both ends apply the sum of both.
            start, end = stage.files.tied
            grad_P[start:end] = torch.randn(end - start, generator=torch.Generator().manual_seed(-version))
        return grad_P

    undisturbed = [stage.state() for stage in stages]
    for stage, state in zip(stages, undisturbed, strict=True):
        for version in range(5):
            state.apply(gradient(stage, version), 1.0)
        write_part(place, 5, stage.files, state.snapshot())
    assert complete(place, 5, 2) == {}
    checkpoint = newest(tmp_path, RUN).checkpoint
    assert checkpoint is not None
    for stage, state in zip(stages, undisturbed, strict=True):
        resumed = stage.state()
        version, snapshot = read_stage(checkpoint, stage.files)
        resumed.load(snapshot, version)
        for after in range(5, 9):
            state.apply(gradient(stage, after), 1.0)
            resumed.apply(gradient(stage, after), 1.0)
        assert resumed.version == 9
        assert resumed.snapshot() == state.snapshot()


def test_another_cut_of_the_model_is_refused(place):
    write_all(place, 7)
    checkpoint = newest(place.directory, RUN).checkpoint
    assert checkpoint is not None
    with pytest.raises(ConfigError, match="has 2 stages, not 3"):
        read_stage(checkpoint, toy_stages(3)[0])
    with pytest.raises(ConfigError, match="another cut of the model"):
        read_stage(checkpoint, toy_stages(2, size=504)[1])


# ---- crashes and damage


def test_what_is_not_whole_is_not_there(place):
    write_all(place, 100)
    write_part(place, 200, toy_stages()[0], toy_snapshot(toy_stages()[0], 200))
    assert list(complete(place, 200, 2)) == [1]
    assert list(missing_parts(place, 200, 2)) == [1]
    assert list(missing_parts(place, 300, 2)) == [0, 1]
    assert missing_parts(place, 100, 2) == {}
    assert found_version(place) == 100


WRITER = """
import sys
from pathlib import Path
from mycel.node.training.checkpoint_files import CheckpointPlace, complete, write_part
from mycel.node.training.checkpoint_layout import StageFiles

directory, model, snapshot, stops_at = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
checks = 0


def check():
    global checks
    checks += 1
    if checks == stops_at:
        print("in the middle", flush=True)
        sys.stdin.read()


place = CheckpointPlace(directory, model, bytes.fromhex(sys.argv[5]), bytes.fromhex(sys.argv[6]), keep=2)
print("ready", flush=True)
sys.stdin.readline()
for k in range(2):
    stage = StageFiles(k, 2, ((f"w.{k}", 0, 1000, (1000,)),))
    write_part(place, 200, stage, memoryview(snapshot.read_bytes()), check)
    complete(place, 200, 2, check)
"""
BARE_STAGES = [StageFiles(k, 2, ((f"w.{k}", 0, 1000, (1000,)),)) for k in range(2)]


def start_writer(place: CheckpointPlace, tmp_path: Path, stops_at: int) -> subprocess.Popen[str]:
    snapshot = tmp_path / "snapshot"
    snapshot.write_bytes(torch.randn(3000, generator=torch.Generator().manual_seed(0)).numpy().tobytes())
    arguments = [place.directory, place.model, snapshot, stops_at, RUN.hex(), RECIPE.hex()]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.loopback
@pytest.mark.parametrize("stops_at", [1, 6, 9, 12, 18])
def test_a_process_killed_in_the_middle_leaves_the_older_one_and_the_next_makes_it_good(place, tmp_path, stops_at):
    write_all(place, 100, BARE_STAGES)
    with start_writer(place, tmp_path, stops_at) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "ready\n"
        assert writer.stdout.readline() == "in the middle\n"
        writer.kill()
    assert found_version(place) == 100
    for stage in BARE_STAGES:
        write_part(place, 200, stage, memoryview((tmp_path / "snapshot").read_bytes()))
        complete(place, 200, 2)
    assert found_version(place) == 200
    assert folders(place) == ["step-00000100", "step-00000200"]
    assert not [path for path in place.directory.rglob("*") if path.name.startswith(".")]


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("stage-1.json"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "training/stage-0.safetensors",
        "training/stage-1.safetensors",
    ],
)
def test_a_flipped_byte_is_found_and_the_version_can_be_written_again(place, name):
    write_all(place, 100)
    write_all(place, 200)
    file = place.whole(200) / name
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    file.write_bytes(data)
    found = newest(place.directory, RUN)
    assert found.checkpoint is not None
    assert found.checkpoint.version == 100
    assert len(found.passed_over) == 1
    assert f"{name} is damaged" in found.passed_over[0]
    assert "set aside as step-00000200.damaged-" in found.passed_over[0]
    write_all(place, 200)
    assert found_version(place) == 200


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "training/stage-1.safetensors"])
def test_what_is_damaged_after_it_was_found_is_noticed_when_it_is_read(place, name):
    write_all(place, 100)
    checkpoint = newest(place.directory, RUN).checkpoint
    assert checkpoint is not None
    data = bytearray((place.whole(100) / name).read_bytes())
    data[-5] ^= 1
    (place.whole(100) / name).write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged"):
        # The last stage reads the table from the file of the first.
        read_stage(checkpoint, toy_stages()[1])


def test_a_part_that_is_damaged_is_missing_again(place):
    stages = toy_stages()
    for stage in stages:
        write_part(place, 100, stage, toy_snapshot(stage, 100))
    file = place.partial(100) / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "is damaged" in complete(place, 100, 2)[1]
    assert list(missing_parts(place, 100, 2)) == [1]
    assert found_version(place) is None
    write_part(place, 100, stages[1], toy_snapshot(stages[1], 100))
    assert complete(place, 100, 2) == {}


def test_parts_of_other_optimizers_make_no_whole(place):
    stages = toy_stages()
    write_part(place, 100, stages[0], toy_snapshot(stages[0], 100, moments=2))
    write_part(place, 100, stages[1], toy_snapshot(stages[1], 100, moments=1))
    assert complete(place, 100, 2) == {1: "it has 1 moments, and stage 0 has 2"}


def edit_note(place: CheckpointPlace, **changes: object) -> None:
    path = place.whole(100) / "training" / "checkpoint.json"
    note = json.loads(path.read_text())
    for key, value in changes.items():
        note[key] = value(note[key]) if callable(value) else value
    path.write_text(json.dumps(note))


def moved(old: str, new: str):
    return {"files": lambda files: {(new if name == old else name): value for name, value in files.items()}}


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 99},
        {"n_stages": 1},
        {"n_stages": 3},
        {"n_stages": 10**6},
        {"moments": 10**9},
        {"moments": -1},
        {"format": 2},
        {"table_offset": -8},
        {"files": []},
        {"files": {}},
        moved("tokenizer.json", "../../outside"),
        moved("tokenizer.json", "/etc/hostname"),
        moved("tokenizer.json", "training/stage-2.safetensors"),
        moved("tokenizer.json", "modeling.py"),
        moved("config.json", "generation_config.json"),
        {"files": lambda files: {**files, "tokenizer.json": {"sha256": "00" * 32, "size_bytes": 2**60}}},
        {"files": lambda files: {**files, "tokenizer.json": {"sha256": "x", "size_bytes": 1}}},
        {"more": 1},
    ],
)
def test_a_hostile_note_is_passed_over(place, changes):
    write_all(place, 100)
    edit_note(place, **changes)
    found = newest(place.directory, RUN)
    assert found.checkpoint is None
    assert len(found.passed_over) == 1
    assert "\n" not in found.passed_over[0]


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'"' + b"x" * 5_000])
def test_a_note_that_is_none_is_passed_over_and_left_alone(place, data):
    """Without its note nobody knows whose it is."""
    write_all(place, 100)
    (place.whole(100) / "training" / "checkpoint.json").write_bytes(data)
    found = newest(place.directory, RUN)
    assert found.checkpoint is None
    assert len(found.passed_over) == 1
    assert place.whole(100).is_dir()


@pytest.mark.parametrize("offset", [0, 2**44, 10_000])
def test_a_table_that_is_not_where_the_note_says_is_refused(place, offset):
    write_all(place, 100)
    edit_note(place, table_offset=offset)
    checkpoint = newest(place.directory, RUN).checkpoint
    assert checkpoint is not None
    with pytest.raises(ConfigError, match=r"does not hold the table|cannot read"):
        read_stage(checkpoint, toy_stages()[1])


def test_an_empty_or_absent_directory_holds_no_checkpoint(place):
    assert newest(place.directory, RUN).checkpoint is None
    place.directory.mkdir()
    assert newest(place.directory, RUN) == newest(place.directory / "absent", RUN)


def test_going_back_takes_the_newest_that_is_old_enough(place):
    for version in (100, 200):
        write_all(place, version)
    versions = [newest(place.directory, RUN, at_most=limit).checkpoint for limit in (99, 100, 150, 200, 300)]
    assert [found and found.version for found in versions] == [None, 100, 100, 200, 200]


# ---- what stays


def test_the_newest_stay_and_leftovers_go(place):
    stages = toy_stages()
    write_part(place, 150, stages[0], toy_snapshot(stages[0], 150))
    for version in (100, 200, 300):
        write_all(place, version)
        write_part(place, version + 1, stages[1], toy_snapshot(stages[1], version + 1))
    assert folders(place) == ["step-00000200", "step-00000300", f"step-00000301.{RUN.hex()[:16]}.partial"]
    write_all(replace(place, keep=1), 400)
    assert folders(place) == ["step-00000400"]


def test_parts_that_never_become_whole_do_not_fill_the_disk(place):
    stage = toy_stages()[0]
    for version in (100, 200, 300, 400, 500):
        write_part(place, version, stage, toy_snapshot(stage, version))
        assert list(complete(place, version, 2)) == [1]
    assert [name.partition(".")[0] for name in folders(place)] == ["step-00000300", "step-00000400", "step-00000500"]


def test_a_part_can_be_read_alone_unless_its_table_is_elsewhere(place):
    first, last = toy_stages()
    for version in (100, 200):
        for stage in (first, last):
            write_part(place, version, stage, toy_snapshot(stage, version))
    assert read_part(place, first) == (200, toy_snapshot(first, 200))
    assert read_part(place, first, at_most=199) == (100, toy_snapshot(first, 100))
    assert read_part(place, first, at_most=99) is None
    assert last.borrows_table
    assert read_part(place, last) is None
    file = place.partial(200) / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigError, match="damaged"):
        read_part(place, first)


def test_what_comes_too_late_is_not_written(place):
    write_all(place, 200)
    stage = toy_stages()[0]
    write_part(place, 100, stage, toy_snapshot(stage, 100))
    assert complete(place, 100, 2) == {}
    assert folders(place) == ["step-00000200"]


def test_another_run_in_the_same_directory_is_left_alone(place):
    other = replace(place, run=hashlib.sha256(b"another").digest(), keep=1)
    stage = toy_stages()[0]
    write_all(other, 100)
    write_part(other, 150, stage, toy_snapshot(stage, 150))
    with pytest.raises(ConfigError, match="step-00000100 is in the way: it is no checkpoint of this run"):
        write_part(place, 100, stage, toy_snapshot(stage, 100))
    for version in (200, 300, 400):
        write_all(place, version)
    assert found_version(other) == 100
    assert found_version(place) == 400
    assert list(missing_parts(other, 150, 2)) == [1]


def test_a_folder_that_only_has_such_a_name_is_left_alone(place):
    (place.directory / "step-00000100").mkdir(parents=True)
    (place.directory / "step-00000100" / "notes.txt").write_text("mine")
    assert newest(place.directory, RUN).checkpoint is None
    with pytest.raises(ConfigError, match="in the way"):
        write_all(place, 100)
    write_all(place, 200)
    assert (place.directory / "step-00000100" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("step-00000100", 100),
        ("step-123456789", 123456789),
        ("step-100", None),
        ("step-000000100", None),
        ("step-00000100.abc.partial", None),
        ("step-00000100\n", None),
        ("step-", None),
    ],
)
def test_the_name_of_a_whole_one(name, version):
    assert version_of(name) == version


# ---- races


def test_many_threads_write_and_complete_the_same_at_once(place):
    """Two peers a stage, all with the same state, and checkpoints that follow fast on each other."""
    stages = [stage for stage in toy_stages(3) for _ in range(2)]
    barrier = threading.Barrier(len(stages))
    errors: list[BaseException] = []

    def write(stage: StageFiles) -> None:
        try:
            for version in range(1, 13):
                barrier.wait(60)
                write_part(place, version, stage, toy_snapshot(stage, version))
                complete(place, version, 3)
        except BaseException as error:
            errors.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=write, args=(stage,)) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    complete(place, 12, 3)
    assert folders(place) == ["step-00000011", "step-00000012"]
    checkpoint = newest(place.directory, RUN).checkpoint
    assert checkpoint is not None
    assert checkpoint.version == 12
    for stage in stages:
        assert read_stage(checkpoint, stage)[1] == toy_snapshot(stage, 12)
    assert not [path for path in place.directory.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.loopback
def test_two_processes_write_the_same_at_once(place, tmp_path):
    with start_writer(place, tmp_path, -1) as one, start_writer(place, tmp_path, -1) as two:
        for writer in (one, two):
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in (one, two):
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        assert (one.wait(60), two.wait(60)) == (0, 0)
    assert found_version(place) == 200
    assert folders(place) == ["step-00000200"]


# ---- disks


def full_disk(monkeypatch, n_files: int = 0) -> None:
    """Writing fails with ENOSPC in the middle of a file, from the `n_files`-th on."""
    left = [n_files]
    real = checkpoint_bytes.os.fsync

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint_bytes.os, "fsync", fsync)


@pytest.mark.parametrize("n_files", [0, 1, 3, 5])
def test_a_full_disk_is_named_in_one_line(place, monkeypatch, n_files):
    stage = toy_stages()[0]
    with monkeypatch.context() as patched:
        full_disk(patched, n_files)
        with pytest.raises(ConfigError, match=r"no space left on the disk of .*step-00000100") as caught:
            write_part(place, 100, stage, toy_snapshot(stage, 100))
    assert "\n" not in str(caught.value)
    assert found_version(place) is None
    assert not [path for path in place.directory.rglob("*") if path.name.endswith(".tmp")]
    write_all(place, 100)
    assert found_version(place) == 100


def test_a_directory_that_cannot_be_made_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    stage = toy_stages()[0]
    with pytest.raises(ConfigError, match=r"cannot write .*file"):
        write_part(replace(place, directory=tmp_path / "file"), 100, stage, toy_snapshot(stage, 100))


def test_a_disk_that_fills_up_before_the_whole_leaves_the_parts(place, monkeypatch):
    for stage in toy_stages():
        write_part(place, 100, stage, toy_snapshot(stage, 100))
    with monkeypatch.context() as patched:
        full_disk(patched)
        with pytest.raises(ConfigError, match="no space left"):
            complete(place, 100, 2)
    assert found_version(place) is None
    assert complete(place, 100, 2) == {}


# ---- what a stage says of itself


@pytest.mark.parametrize(
    "tensors",
    [
        (("a", 0, 4, (2, 3)),),
        (("a", 1, 5, (4,)),),
        (("a", 0, 4, (4,)), ("b", 5, 6, (1,))),
        (("a", 0, 4, (4,)), ("b", 3, 6, (3,))),
    ],
)
def test_tensors_that_do_not_fill_the_stage_are_a_bug(tensors):
    with pytest.raises(ValueError, match="elements"):
        StageFiles(0, 1, tensors)


def test_a_tied_table_is_one_tensor():
    with pytest.raises(ValueError, match="tied table"):
        StageFiles(0, 2, (("a", 0, 4, (4,)),), (0, 3))


@pytest.mark.parametrize("size_bytes", [0, 15, 17, 16 * 6, 3])
def test_bytes_that_are_no_snapshot_are_a_bug(place, size_bytes):
    with pytest.raises(ValueError, match="no snapshot"):
        write_part(place, 1, StageFiles(0, 1, (("a", 0, 4, (4,)),)), memoryview(bytes(size_bytes)))


# ---- while training goes on


@dataclass
class ToyState:
    """A state whose snapshot is that of the toy stage."""

    stage: StageFiles
    version: int = 0

    def snapshot(self) -> memoryview:
        return toy_snapshot(self.stage, self.version)


class Inline:
    """Compute without a thread."""

    async def run(self, job, *, cost_s: float = 0.0):
        await trio.lowlevel.checkpoint()
        return Done(job(), 0.0, 0.0)


@dataclass
class Disk:
    """Jobs that wait for the disk, in virtual time and in place; `take_s` each."""

    take_s: float = 0.0
    running: int = 0
    most: int = field(default=0)

    async def __call__(self, job):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.take_s)
            return job(lambda: None)
        finally:
            self.running -= 1


@dataclass
class Events:
    seen: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def __call__(self, name: str, /, **fields: object) -> None:
        self.seen.append((name, fields))

    def of(self, name: str) -> list[object]:
        return [fields.get("version") for event, fields in self.seen if event == name]


PART = CheckpointPart(every=10, keep=2)


def due(version: int) -> bool:
    return is_due(PART, version, 47)


async def steps(checkpointer: Checkpointer, state: ToyState, first: int, last: int, step_s: float = 1.0) -> None:
    for version in range(first, last + 1):
        await trio.sleep(step_s)
        state.version = version
        await checkpointer.after_step(version, state, Inline())


def run_virtual(main: Callable[[], object]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_when_a_checkpoint_is_due():
    assert [v for v in range(50) if due(v)] == [10, 20, 30, 40, 47]
    assert [v for v in range(50) if is_due(CheckpointPart(every=0), v, 47)] == [47]
    rounds = (0, 20, 40, 47)  # the last one is shorter
    assert [v for v in rounds if is_due(CheckpointPart(every=25), v, 47, 20)] == [40, 47]


def test_checkpoints_are_written_behind_the_steps_and_become_whole(place):
    stages = toy_stages()
    events = [Events(), Events()]
    # The second disk is slow: what the first wrote is whole only when that one is done.
    makers = [
        Checkpointer(place, stage, due, event=event, blocking=Disk(take_s))
        for stage, event, take_s in zip(stages, events, (0.1, 1.5), strict=True)
    ]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for maker in makers:
                nursery.start_soon(maker.run)
            async with trio.open_nursery() as both:
                for maker, stage in zip(makers, stages, strict=True):
                    both.start_soon(steps, maker, ToyState(stage), 1, 11)
            assert (makers[0].kept, makers[0].whole) == (10, 0)
            assert makers[1].kept == 0
            async with trio.open_nursery() as both:
                for maker, stage in zip(makers, stages, strict=True):
                    both.start_soon(steps, maker, ToyState(stage), 12, 47)
            for maker in makers:
                await maker.settled()
            assert await makers[0].missing_parts(47) == {}
            # As the next step would: the other's part came later than one's own.
            await makers[0].after_step(48, ToyState(stages[0], 48), Inline())
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(1)
            nursery.cancel_scope.cancel()

    run_virtual(main)
    for maker, event in zip(makers, events, strict=True):
        assert (maker.kept, maker.whole) == (47, 47)
        assert event.of("checkpoint.written") == [10, 20, 30, 40, 47]
        assert event.of("checkpoint.whole") == [10, 20, 30, 40, 47]
        assert event.of("checkpoint.failed") == []
    assert folders(place) == ["step-00000040", "step-00000047"]
    checkpoint = newest(place.directory, RUN).checkpoint
    assert checkpoint is not None
    for stage in stages:
        assert read_stage(checkpoint, stage) == (47, toy_snapshot(stage, 47))


def test_if_the_disk_is_slower_than_the_steps_the_newest_waits(place):
    stage, events, disk = toy_stages(1)[0], Events(), Disk(take_s=12.0)
    maker = Checkpointer(place, stage, due, event=events, blocking=disk)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(maker.run)
            await steps(maker, ToyState(stage), 1, 47)
            await maker.settled()
            nursery.cancel_scope.cancel()

    run_virtual(main)
    assert disk.most == 1
    # Each takes 24 s, that is 24 steps.
    assert events.of("checkpoint.dropped") == [20, 40]
    assert events.of("checkpoint.whole") == [10, 30, 47]
    assert maker.whole == 47


def test_a_step_waits_for_the_copy_and_not_for_the_disk(place):
    stage = toy_stages(1)[0]
    maker = Checkpointer(place, stage, due, blocking=Disk(take_s=100.0))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(maker.run)
            await steps(maker, ToyState(stage), 1, 30)
            assert trio.current_time() < 31 + start_s
            nursery.cancel_scope.cancel()

    start_s = 0.0

    async def timed() -> None:
        nonlocal start_s
        start_s = trio.current_time()
        await main()

    run_virtual(timed)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(place, monkeypatch):
    stage, events = toy_stages(1)[0], Events()
    maker = Checkpointer(place, stage, due, event=events, blocking=Disk())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(maker.run)
            with monkeypatch.context() as patched:
                full_disk(patched)
                await steps(maker, ToyState(stage), 1, 15)
            assert (maker.kept, maker.whole) == (0, 0)
            await steps(maker, ToyState(stage), 16, 25)
            await maker.settled()
            nursery.cancel_scope.cancel()

    run_virtual(main)
    assert events.of("checkpoint.failed") == [10]
    assert "no space left" in str(events.seen[0][1]["reason"])
    assert events.of("checkpoint.whole") == [20]
    assert maker.whole == 20


def test_one_peer_alone_adds_the_parts_of_other_stages(place):
    stages, events = toy_stages(3), Events()
    maker = Checkpointer(place, stages[1], due, event=events, blocking=Disk())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(maker.run)
            await steps(maker, ToyState(stages[1]), 1, 10)
            await maker.settled()
            assert list(await maker.missing_parts(10)) == [0, 2]
            for stage in (stages[0], stages[2]):
                assert await maker.add(stage, 10, toy_snapshot(stage, 10))
            nursery.cancel_scope.cancel()

    run_virtual(main)
    assert (maker.kept, maker.whole) == (10, 10)
    assert found_version(place) == 10


def test_a_resumed_run_does_not_write_what_it_came_from(place):
    stage, events = toy_stages(1)[0], Events()
    write_all(place, 10, [stage])
    maker = Checkpointer(place, stage, due, whole=10, event=events, blocking=Disk())
    assert (maker.kept, maker.whole) == (10, 10)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(maker.run)
            await steps(maker, ToyState(stage), 10, 20)
            await maker.settled()
            nursery.cancel_scope.cancel()

    run_virtual(main)
    assert events.of("checkpoint.written") == [20]


def test_cancelled_in_the_middle_of_a_file_nothing_is_left_of_it(place, monkeypatch):
    """On a real thread: the writer is stopped between two portions of a large file."""
    monkeypatch.setattr(checkpoint_bytes, "_PORTION_BYTES", 100)
    stage = toy_stages(1)[0]
    events = Events()
    write_all(place, 10, [stage])
    portions = 0

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            here = trio.Event()

            async def blocking(job):
                def with_stop(check):
                    def stops():
                        nonlocal portions
                        portions += 1
                        if portions == 150:
                            trio.from_thread.run_sync(here.set)
                            trio.from_thread.run(trio.sleep_forever)
                        check()

                    return job(stops)

                return await on_thread(with_stop)

            maker = Checkpointer(place, stage, due, whole=10, event=events, blocking=blocking)
            nursery.start_soon(maker.run)
            await maker.after_step(20, ToyState(stage, 20), Inline())
            await here.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert portions == 150
    assert events.seen == []
    assert found_version(place) == 10
    assert not [path for path in place.directory.rglob("*") if path.name.endswith(".tmp")]
    assert not (place.partial(20) / "training" / "stage-0.json").exists()


def test_on_a_thread_a_check_ends_the_job_of_a_cancelled_caller():
    began = threading.Event()

    def job(check) -> None:
        began.set()
        while True:
            check()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on_thread, job)
            await trio.to_thread.run_sync(began.wait)
            nursery.cancel_scope.cancel()

    trio.run(main)
