"""From a recipe to a run: one directory, made whole and once, the same for whoever makes it again."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from mycel.node.demo import demo_model_dir
from mycel.node.model_info import inspect_model
from mycel.node.model_manifest import build_manifest
from mycel.node.model_store import ModelStore
from mycel.node.training import founding
from mycel.node.training.founding import FoundedRun, found_run, plan_of, read_recipe, recipe_of, refuse_bottlenecks
from mycel.protocols.errors import ConfigError
from mycel.security.identity import Identity
from mycel.swarm.manifest import decode_manifest, manifest_bytes, sign_manifest, swarm_id
from mycel.swarm.training.recipe import BorderPart, DataPart, MethodPart, Recipe, StepPart, canonical, n_steps
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
FOUNDER = Identity.from_seed(bytes(32))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks in bfloat16, with what a repository has besides."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_tokenizer(make_tiny_model("llama", folder, n_blocks=3, dtype="bfloat16"))
    (folder / "LICENSE").write_text("a licence")
    (folder / "recipe.toml").write_text("of an earlier run")
    (folder / "modeling_tiny.py").write_text("code")
    return folder


def write_recipe(
    base: Path, *, model: str = "tiny", start: str = "scratch", head: str = "", data: str = "", tail: str = ""
) -> Path:
    (base / "a.txt").write_text("the text of this test, again and again. " * 20)
    path = base / "r.toml"
    path.write_text(
        f'name = "r"\n{head}\n[model]\npath = "{model}"\nstart = "{start}"\n'
        f'[data]\nfiles = ["a.txt"]\n{data or "sequence = 16"}\n'
        f"[step]\nsteps = 3\nbatch_tokens = 64\nmicrobatch = 2\n{tail}\n"
    )
    return path


@pytest.fixture
def base(tmp_path: Path, tiny: Path) -> Path:
    """A folder with the model beside the recipes."""
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copytree(tiny, folder / "tiny")
    return folder


def contents(run: FoundedRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.directory.iterdir()}


def test_the_same_recipe_gives_the_same_run_byte_by_byte(base, tmp_path):
    recipe = write_recipe(base)
    run = found_run(recipe, tmp_path / "one")
    assert run.directory.parent == tmp_path / "one" / "runs"
    stamps = {path: path.stat().st_mtime_ns for path in run.directory.iterdir()}
    assert found_run(recipe, tmp_path / "one").directory == run.directory
    assert {path: path.stat().st_mtime_ns for path in run.directory.iterdir()} == stamps
    torch.manual_seed(99)  # whatever was drawn before
    again = found_run(recipe, tmp_path / "two")
    assert again.directory.name == run.directory.name
    assert contents(again) == contents(run)


def test_founding_leaves_the_random_numbers_of_others_alone(base, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found_run(write_recipe(base), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_has_what_a_swarm_carries_and_its_own_recipe(base, tmp_path):
    run = found_run(write_recipe(base), tmp_path)
    assert sorted(contents(run)) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.toml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert recipe_of(run.directory) == run.recipe
    assert recipe_of(base / "absent") is None
    assert (run.recipe.data.files, run.local.data.files) == ((), ("a.txt",))
    assert run.recipe.data.fingerprint == run.dataset.fingerprint()
    assert run.base == base
    assert json.loads((run.directory / "config.json").read_text())["dtype"] == "float32"
    assert inspect_model(run.directory).dtype == "float32"
    assert not list((tmp_path / "runs").glob(".*.tmp"))


def test_weights_from_scratch_are_those_that_transformers_draws(base, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    run = found_run(write_recipe(base, head="seed = 7"), tmp_path)
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run.directory), dtype=torch.float32)
    found = load_file(run.directory / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(found, torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("architecture", ["gpt2", "llama-tied", "qwen3_moe"])
def test_other_architectures_start_from_scratch_too(tmp_path, architecture):
    make_tiny_tokenizer(make_tiny_model(architecture, tmp_path / "tiny", n_blocks=2))
    run = found_run(write_recipe(tmp_path, head="stages = 2"), tmp_path / "data")
    assert inspect_model(run.directory).n_blocks == 2
    assert plan_of(run.recipe, bytes(32), run.directory).spans == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "bfloat16"), ("llama-tied", "float32"), ("gpt2", "float16"), ("qwen3_moe", "bfloat16")],
)
def test_weights_of_a_checkpoint_are_widened_and_nothing_else(tmp_path, architecture, dtype):
    from transformers import AutoModelForCausalLM

    source = make_tiny_tokenizer(
        make_tiny_model(architecture, tmp_path / "tiny", n_blocks=2, dtype=dtype, max_shard_size="40KB")
    )
    run = found_run(write_recipe(tmp_path, start="weights"), tmp_path / "data")
    assert inspect_model(run.directory).dtype == "float32"
    was = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    now = {name: tensor for file in run.directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert now.keys() == was.keys()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, was[name].float()) for name, tensor in now.items())
    loaded = AutoModelForCausalLM.from_pretrained(run.directory)
    assert loaded.dtype == torch.float32
    wide = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens_BT = torch.arange(8)[None]
    assert torch.equal(loaded(tokens_BT).logits, wide(tokens_BT).logits)


def test_whatever_goes_in_makes_another_run(base, tmp_path):
    def name() -> str:
        return found_run(recipe, tmp_path).directory.name

    recipe = write_recipe(base)
    names = [name()]
    recipe = write_recipe(base, head="seed = 1")
    names.append(name())
    recipe = write_recipe(base, start="weights")
    names.append(name())
    weights = load_file(base / "tiny" / "model.safetensors")
    weights["model.norm.weight"] += 1.0
    from safetensors.torch import save_file

    save_file(weights, base / "tiny" / "model.safetensors")
    names.append(name())
    recipe = write_recipe(base)
    assert name() == names[0]
    (base / "tiny" / "LICENSE").write_text("another licence")
    names.append(name())
    (base / "a.txt").write_text("other text, and enough of it. " * 20)
    names.append(name())
    assert len(set(names)) == len(names)


def test_the_recipe_travels_with_the_manifest(base, tmp_path):
    run = found_run(write_recipe(base), tmp_path / "data")
    unsigned, index = build_manifest(run.directory, tmp_path / "cache")
    manifest = sign_manifest(unsigned, FOUNDER)
    assert decode_manifest(manifest_bytes(manifest)) == manifest
    (spec,) = [file for file in manifest.files if file.name == "recipe.toml"]
    owner, joiner = ModelStore(tmp_path / "owner"), ModelStore(tmp_path / "joiner")
    owner.share(manifest, index)
    directory = joiner.save_manifest(manifest)
    for file in joiner.missing_files(manifest):
        joiner.save_file(manifest, file, owner.read(swarm_id(manifest), file.sha256, 0, file.size_bytes))
    assert recipe_of(directory) == run.recipe
    assert (directory / "recipe.toml").stat().st_size == spec.size_bytes
    assert plan_of(run.recipe, bytes(32), directory) == plan_of(run.recipe, bytes(32), run.directory)
    assert "recipe.toml" not in {file.name for file in build_manifest(demo_model_dir(), tmp_path / "cache")[0].files}


def test_a_recipe_from_elsewhere_cannot_name_files_of_this_machine(tmp_path):
    hostile = Recipe(name="r", data=DataPart(files=("/etc/passwd",)), step=StepPart(steps=1))
    (tmp_path / "recipe.toml").write_text(canonical(hostile))
    assert recipe_of(tmp_path).data.files == ()


def test_who_comes_second_finds_the_directory(base, tmp_path, monkeypatch):
    """Two nodes found the run at the same time where the system has no locks: the slower one takes what is there."""
    monkeypatch.setattr(founding, "alone", lambda *_: contextlib.nullcontext(False))
    recipe = write_recipe(base)
    make = founding._draw_weights
    made: list[FoundedRun] = []

    def overtaken(model: Path, target: Path, seed: int) -> None:
        make(model, target, seed)
        monkeypatch.setattr(founding, "_draw_weights", make)
        made.append(found_run(recipe, tmp_path))

    monkeypatch.setattr(founding, "_draw_weights", overtaken)
    run = found_run(recipe, tmp_path)
    assert made[0].directory == run.directory
    assert list((tmp_path / "runs").iterdir()) == [run.directory]


def test_who_waited_for_another_to_make_the_run_does_not_make_it_again(base, tmp_path, monkeypatch):
    recipe = write_recipe(base)
    run = found_run(recipe, tmp_path)
    aside = run.directory.rename(tmp_path / "aside")

    @contextlib.contextmanager
    def waits(*_: object) -> Iterator[bool]:
        aside.rename(run.directory)
        yield True

    monkeypatch.setattr(founding, "alone", waits)
    monkeypatch.setattr(founding, "_fill", None)
    assert found_run(recipe, tmp_path).directory == run.directory


def test_what_a_killed_process_left_is_removed_by_the_next(base, tmp_path):
    recipe = write_recipe(base)
    run = found_run(recipe, tmp_path)
    left = run.directory.rename(run.directory.with_name(f".{run.directory.name}.abc.tmp"))
    assert found_run(recipe, tmp_path).directory == run.directory
    assert not left.exists()


def test_nothing_is_left_of_a_run_that_could_not_be_made(base, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(founding, "_draw_weights", fail)
    with pytest.raises(ConfigError, match="no space left"):
        found_run(write_recipe(base), tmp_path)
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"head": "stages = 4"}, "r.toml: stages: 4 are more than the model's 3 blocks"),
        ({"data": "sequence = 512"}, "r.toml: step.batch_tokens"),
        ({"tail": "[border]\nbottleneck = 'linear'\nfactor = 5"}, "r.toml: border.factor: must be one of 2, 4, 8"),
        ({"model": "absent"}, "absent"),
        ({"data": 'sequence = 32\nfingerprint = "' + "0" * 64 + '"'}, "this is not the text of run r"),
        ({"data": "sequence = 16\nheld_out = 0.0\nkind = 'jsonl'"}, "a.txt, line 1: not valid JSON"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(base, tmp_path, change, expected):
    with pytest.raises(ConfigError) as caught:
        found_run(write_recipe(base, **change), tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def change_config(base: Path, **fields: object) -> None:
    path = base / "tiny" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_sequence_must_fit_the_models_positions(base, tmp_path):
    change_config(base, max_position_embeddings=16)
    assert found_run(write_recipe(base), tmp_path).dataset.sequence == 16
    change_config(base, max_position_embeddings=15)
    with pytest.raises(ConfigError, match=r"r\.toml: data\.sequence: the model has 15 positions, not 16"):
        found_run(write_recipe(base), tmp_path)


def test_a_tokenizer_must_fit_the_model(base, tmp_path):
    change_config(base, vocab_size=200)
    with pytest.raises(ConfigError, match="it has 259 tokens, the model 200"):
        found_run(write_recipe(base), tmp_path)
    (base / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        found_run(write_recipe(base), tmp_path)


def test_a_bottleneck_must_divide_the_width(base, tmp_path):
    change_config(base, hidden_size=36, head_dim=8)
    recipe = write_recipe(base, head="stages = 2", tail='[border]\nbottleneck = "linear"\nfactor = 8')
    with pytest.raises(ConfigError, match=r"border\.factor: 8 does not divide 36"):
        found_run(recipe, tmp_path)


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "r.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        read_recipe(tmp_path / "r.toml")


# ---- the plan of a model


def test_the_head_counts_as_a_part_of_the_last_stage(tmp_path):
    """The demo's table of 3072 x 192 is one and a half of its blocks."""
    run = found_run(RECIPES / "topics.toml", tmp_path)
    plan = plan_of(run.recipe, bytes(32), run.directory)
    assert plan.spans == ((0, 3), (3, 6), (6, 8))
    assert (plan.n_steps, plan.n_microbatches, plan.step_tokens) == (60, 16, 4096)
    assert plan_of(run.recipe, bytes(32), run.directory) == plan
    two = msgspec.structs.replace(run.recipe, stages=2)
    assert plan_of(two, bytes(32), run.directory).spans == ((0, 5), (5, 8))


def test_experts_cost_what_a_token_meets_of_them(tmp_path):
    # Every second block of this one has experts: 4, of which a token meets 2.
    directory = make_tiny_model("qwen3_moe", tmp_path / "moe", n_blocks=4)
    tensors = inspect_model(directory).tensors["block.1"]
    experts = [entry.size_bytes for entry in tensors if ".experts." in entry.name]
    assert founding._cost(tensors, 0.5) == sum(entry.size_bytes for entry in tensors) - sum(experts) // 2
    assert founding._experts_share(founding.load_config(directory)) == 0.5
    assert experts


# ---- the examples in the documentation


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_are_recipes(path):
    recipe = read_recipe(path)
    assert n_steps(recipe) > 0
    assert canonical(recipe)


def test_the_documentation_knows_every_key():
    text = (RECIPES.parent / "recipe.md").read_text("utf-8")
    sections = {name: part for name, _, part in (s.partition("]\n") for s in text.split("## [")[1:])}
    recipe = read_recipe(RECIPES / "topics.toml")
    for choice in get_args(MethodPart):
        assert all(f"`{key}`" in sections["method"] for key in choice.__struct_fields__), choice
    for name in recipe.__struct_fields__:
        value = getattr(recipe, name)
        if isinstance(value, msgspec.Struct):
            missing = [key for key in value.__struct_fields__ if f"| `{key}` |" not in sections[name]]
            assert not missing, name
        else:
            assert f"| `{name}` |" in text


@pytest.mark.parametrize(
    ("bottleneck", "stages", "refused"), [("maxout", 2, True), ("maxout", 1, False), ("none", 2, False)]
)
def test_a_checkpoint_with_learned_bottlenecks_is_taken_for_no_model(tmp_path, bottleneck, stages, refused):
    """Without what its borders learned its weights are another model, and would answer nonsense."""
    folder = tmp_path / "step-00000003" / "training"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("{}")
    recipe = Recipe("x", step=StepPart(steps=1), stages=stages, border=BorderPart(bottleneck=bottleneck))
    (folder / "recipe.toml").write_text(canonical(msgspec.structs.replace(recipe, data=DataPart("python-topics"))))
    if refused:
        with pytest.raises(ConfigError, match=r"step-00000003 is a checkpoint of a run with learned bottlenecks"):
            refuse_bottlenecks(folder.parent)
    else:
        refuse_bottlenecks(folder.parent)
    (folder / "checkpoint.json").unlink()
    refuse_bottlenecks(folder.parent)  # somebody else's folder of that name says nothing
