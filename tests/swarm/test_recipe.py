"""The recipe: one line for every mistake, and what travels parses to what it was."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocols.errors import ConfigError
from mycel.swarm.training.recipe import (
    BorderPart,
    CheckpointPart,
    DataPart,
    ModelPart,
    OptimizerPart,
    Recipe,
    SchedulePart,
    StepPart,
    canonical,
    check_recipe,
    n_steps,
    parse_recipe,
    published,
)

SMALLEST = """
name = "a"
[data]
kind = "python-topics"
[step]
steps = 5
"""
FINGERPRINT = "0123456789abcdef" * 4


def said_of(text: str) -> str:
    """What `parse_recipe` refuses a text with; "" if it takes it."""
    try:
        parse_recipe(text, "r.toml")
    except ConfigError as error:
        return str(error)
    return ""


def refusal(text: str) -> str:
    message = said_of(text)
    assert message.startswith("r.toml")
    assert message.isprintable(), "one line that a terminal may show"
    return message.removeprefix("r.toml").removeprefix(": ")


def test_a_recipe_is_mostly_defaults():
    recipe = parse_recipe(SMALLEST, "r.toml")
    assert recipe == Recipe(name="a", data=DataPart(kind="python-topics"), step=StepPart(steps=5))
    assert n_steps(recipe) == 5


def test_tokens_are_rounded_up_to_steps():
    recipe = parse_recipe(SMALLEST.replace("steps = 5", "tokens = 8193"), "r.toml")
    assert n_steps(recipe) == 2


def test_whole_numbers_will_do_where_a_number_is_wanted():
    assert parse_recipe(SMALLEST + "[optimizer]\nclip = 2", "r.toml").optimizer.clip == 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = ", " is not valid TOML: Invalid value (at end of document)"),
        ("[" * 60_000, " is not valid TOML: "),
        ("a = " + "[" * 50_000, " is not valid TOML: "),
        ("a = " + "9" * 6_000, " is not valid TOML: "),
        (" " * 70_000, " is no recipe: it has more than 65536 characters"),
        ("", "name: must be given"),
        ('name = "a b"', "name: must be 1 to 64 letters, digits, dots, underscores and hyphens"),
        ('name = "..\\n"', "name: must be 1 to 64 letters"),
        ('name = "a\\n"', "name: must be 1 to 64 letters"),
        ('name = "a"\nfoo = 1', "foo: there is no such key; known are name, model, data, optimizer"),
        ('name = "a"\n"x\\u001b\\ny" = 1', "x  y: there is no such key"),
        ('name = "a"\n[data]\nfile = "x"', "data.file: there is no such key; known are kind, files, field, sequence"),
        ('name = "a"\ndata = "x"', "data: expected a table, got text"),
        ('name = "a"\n[data]\nfiles = "x"', "data.files: expected a list, got text"),
        ('name = "a"\n[data]\nfiles = [1]', "data.files[0]: expected text, got a whole number"),
        ('name = "a"\n[data]\nsequence = 1', "data.sequence: expected a whole number >= 2"),
        ('name = "a"\n[data]\nheld_out = 0.6', "data.held_out: expected a number <= 0.5"),
        ('name = "a"\n[data]\nfingerprint = "abc"', "data.fingerprint: must be 64 hexadecimal digits"),
        ('name = "a"\n[optimizer]\nname = "adam"', "optimizer.name: must be one of adamw, sgd, not adam"),
        ('name = "a"\n[border]\nfactor = 3', "border.factor: must be one of 2, 4, 8, not 3"),
        ('name = "a"\nrecompute = "?"', "recompute: must be one of auto, always, never, not ?"),
        ('name = "a"\nstages = true', "stages: expected a whole number, got bool"),
        ('name = "a"\n[optimizer]\nbetas = [0.9]', "optimizer.betas: expected a list of length 2, got 1"),
    ],
)
def test_a_mistake_names_its_key_and_what_is_wanted(text, expected):
    assert refusal(text).startswith(expected)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate: expected a number <= 1000"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate: expected a number > 0"),
        ("[optimizer]\nweight_decay = nan", "optimizer.weight_decay: expected a number >= 0"),
        ("[optimizer]\nbetas = [0.9, 1.0]", "optimizer.betas: both must be less than 1"),
        ("[optimizer]\nmomentum = 1", "optimizer.momentum: must be less than 1"),
        ("[schedule]\nwarmup_steps = 6", "schedule.warmup_steps: 6 is more than all 5 steps of the run"),
        ('[model]\npath = ""', "model.path: must name a model directory"),
    ],
)
def test_values_out_of_range(section, expected):
    assert refusal(SMALLEST + section).startswith(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("", "step: say how long to train, in steps or in tokens"),
        ("steps = 1\ntokens = 1", "step: say steps or tokens, not both"),
        (
            "steps = 1\nbatch_tokens = 100",
            "step.batch_tokens: must be a multiple of step.microbatch (8) times data.",
        ),
        ("steps = 1\nbatch_tokens = 100", ", which is 1024: 1024, for example"),
        ("steps = 1\nbatch_tokens = 3000", ", which is 1024: 2048 or 3072, for example"),
        ("steps = 1\nmicrobatch = 1\nbatch_tokens = 1048704", "step.microbatch: a step would have 8193 microbatches"),
        (f"tokens = {2**62}\nbatch_tokens = 1024", "step.tokens: that is 4503599627370496 steps, more than 1073741824"),
    ],
)
def test_steps_that_do_not_come_out(step, expected):
    assert expected in refusal(SMALLEST.replace("steps = 5", step))


def test_the_most_microbatches_are_allowed():
    parse_recipe(SMALLEST + f"microbatch = 1\nbatch_tokens = {8192 * 128}", "r.toml")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("", 'data.files: must name the text to train on (or kind = "python-topics")'),
        ('kind = "jsonl"', "data.files: must name the text"),
        ('kind = "python-topics"\nfiles = ["a"]', 'data.files: kind = "python-topics" reads no files'),
        ('files = ["a", ""]', "data.files: a name in it is empty"),
        ('files = ["a"]\nfield = ""', "data.field: must not be empty"),
    ],
)
def test_text_must_be_named(data, expected):
    assert refusal(SMALLEST.replace('kind = "python-topics"', data)).startswith(expected)


def test_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="here: step: say how long"):
        check_recipe(Recipe(name="a", data=DataPart(kind="python-topics")), "here")


# ---- what travels


def test_what_travels_names_no_place_and_still_parses():
    text = SMALLEST.replace('kind = "python-topics"', 'files = ["/home/me/*.jsonl"]').replace(
        "[step]", '[model]\npath = "../models/tiny/"\n[step]'
    )
    recipe = published(parse_recipe(text, "r.toml"), FINGERPRINT)
    assert (recipe.model.path, recipe.data.files, recipe.data.fingerprint) == ("tiny", (), FINGERPRINT)
    assert "/" not in canonical(recipe)
    assert parse_recipe(canonical(recipe), "recipe.toml") == recipe
    assert published(recipe, FINGERPRINT) == recipe


@pytest.mark.parametrize(
    ("path", "name"), [("demo", "demo"), ("/", "model"), ("C:\\models\\tiny", "tiny"), ("org/name", "name")]
)
def test_a_model_travels_by_its_name(path, name):
    recipe = Recipe(name="a", model=ModelPart(path=path))
    assert published(recipe, "").model.path == name


def test_the_same_recipe_travels_as_the_same_text_however_it_was_written():
    spelled = 'stages = 1\nname = "a"\n[step]\nsteps = 5\n[data]\nkind = "python-topics"\nsequence = 0x80'
    assert canonical(parse_recipe(spelled, "r.toml")) == canonical(parse_recipe(SMALLEST, "r.toml"))


SMALL = st.floats(0.0, 0.99)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
RECIPES = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    model=st.builds(ModelPart, path=TEXTS, start=st.sampled_from(["scratch", "weights"])),
    data=st.builds(
        DataPart,
        kind=st.sampled_from(["auto", "text", "jsonl", "parquet", "dataset"]),
        files=st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        field=TEXTS,
        sequence=st.just(64),
        held_out=st.floats(0.0, 0.5),
        fingerprint=st.sampled_from(["", FINGERPRINT]),
    ),
    optimizer=st.builds(
        OptimizerPart,
        name=st.sampled_from(["adamw", "sgd"]),
        learning_rate=st.floats(1e-300, 1e3),
        betas=st.tuples(SMALL, SMALL),
        epsilon=st.floats(5e-324, 1.0),
        momentum=SMALL,
        weight_decay=st.floats(0.0, 1e6),
        clip=st.floats(0.0, 1e6),
    ),
    schedule=st.builds(
        SchedulePart, name=st.sampled_from(["cosine", "linear", "constant"]), warmup_steps=st.integers(0, 5)
    ),
    step=st.builds(StepPart, steps=st.integers(5, 1 << 30), batch_tokens=st.sampled_from([512, 1024])),
    border=st.builds(
        BorderPart, bottleneck=st.sampled_from(["none", "linear", "maxout"]), factor=st.sampled_from([2, 4, 8])
    ),
    checkpoint=st.builds(CheckpointPart, every=st.integers(0, 1 << 30), keep=st.integers(1, 1 << 48)),
    stages=st.integers(1, 64),
    seed=st.integers(0, 2**63 - 1),
    recompute=st.sampled_from(["auto", "always", "never"]),
)


@given(recipe=RECIPES)
def test_canonical_text_parses_to_the_same_recipe(recipe):
    assert parse_recipe(canonical(recipe), "recipe.toml") == recipe


@given(recipe=RECIPES)
def test_what_is_published_of_any_recipe_parses(recipe):
    travels = published(recipe, FINGERPRINT)
    assert parse_recipe(canonical(travels), "recipe.toml") == travels


@given(text=st.text(max_size=200))
def test_any_text_is_a_recipe_or_refused_in_one_line(text):
    assert said_of(text).isprintable()


KEYS = ["name", "stages", "data", "files", "sequence", "step", "steps", "optimizer", "betas", "x"]
VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-5, 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@given(raw=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_table_is_a_recipe_or_refused_in_one_line(raw):
    text = "\n".join(f"{key} = {_toml(value)}" for key, value in raw.items())
    said = said_of(text)
    assert "not valid TOML" not in said
    assert said.isprintable()


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
