"""Training runs to be measured: a random Llama of a given width, a recipe, and real node processes that train it.

Not a program of its own: `python -m benchmarks.train`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import trio

from mycel.cli.exits import CommandFailedError
from mycel.cli.processes import LocalNetwork, LocalNode, local_network
from mycel.cli.train import files_of, joining, plan_training
from mycel.node.demo import demo_model_dir
from mycel.node.training.metrics import StepMetrics, read_metrics

# Steps at the beginning that are not measured: peers are still being measured by trainers, and torch warms up.
WARM_UP_STEPS = 2
# A run that is stopped when enough was seen of it.
ENDLESS = 100_000
_LOOK_EVERY_S = 0.2
_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama with `vocabulary` "demo" (3072 tokens) or "bytes" (258 and some), so that there is no head to speak of.

    A step takes `n_microbatches` of `n_sequences` sequences of `sequence` tokens.
    """

    hidden: int
    n_blocks: int
    n_microbatches: int
    n_sequences: int = 4
    sequence: int = 128
    vocabulary: str = "demo"

    @property
    def intermediate(self) -> int:
        return self.hidden * 8 // 3 // 16 * 16

    @property
    def step_tokens(self) -> int:
        return self.n_microbatches * self.n_sequences * self.sequence


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen of a swarm at work: from the end of one step to the end of another, `n_steps` later.

    `compute_s` is what a microbatch takes a peer of each stage, forward and backward, as the peers measure it.
    `losses` are those of all steps from the first one on.
    """

    n_steps: int
    seconds: float
    tokens: int
    sent_bytes: int
    compute_s: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_s(self) -> float:
        return self.seconds / self.n_steps


def make_model(directory: Path, size: Size) -> None:
    """Configuration and tokenizer; a run draws the weights from its seed."""
    from transformers import LlamaConfig

    from tests.tiny_models import VOCAB, make_tiny_tokenizer

    directory.mkdir(parents=True)
    n_heads = max(1, size.hidden // 32)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.n_blocks,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=3072 if size.vocabulary == "demo" else VOCAB,
        max_position_embeddings=max(1024, size.sequence),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    if size.vocabulary == "demo":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_model_dir() / name, directory / name)
    else:
        make_tiny_tokenizer(directory)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a recipe says besides the sizes. `model` is a directory beside it, or "demo".

    Without `steps` the run is ended from outside, and its learning rate is constant.
    """

    model: str = "model"
    codec: str = "int8"
    seed: int = 0
    learning_rate: float = 1e-3
    steps: int = 0


def write_recipe(path: Path, size: Size, n_stages: int, asked: Asked) -> Path:
    """A recipe on Python's help texts."""
    schedule = f'name = "cosine"\nwarmup_steps = {asked.steps // 10}' if asked.steps else 'name = "constant"'
    path.write_text(
        f"""name = "bench"
stages = {n_stages}
seed = {asked.seed}
[model]
path = "{asked.model}"
[data]
kind = "python-topics"
sequence = {size.sequence}
[optimizer]
learning_rate = {asked.learning_rate}
[schedule]
{schedule}
[step]
steps = {asked.steps or ENDLESS}
batch_tokens = {size.step_tokens}
microbatch = {size.n_sequences}
[border]
codec = "{asked.codec}"
[checkpoint]
every = 0
""",
        "utf-8",
    )
    return path


async def train(recipe: Path, directory: Path, n_nodes: int, n_steps: int, *, shape: str = "") -> Window:
    """Real processes with one thread each, watched for `n_steps` steps after the first ones; then they are ended.

    Counted from when every stage has its even share of the nodes. Raises CommandFailedError for a node that ends.
    """
    shared = ("--shape", shape) if shape else ()
    plan = plan_training(recipe, n_nodes, directory, threads=1, shared=shared)
    plan.checkpoints.mkdir(parents=True)
    sequences = plan.recipe.step.microbatch
    wanted = (n_nodes // plan.recipe.stages,) * plan.recipe.stages
    async with local_network(directory, n_nodes, threads=1) as network:
        try:
            checkpoints = ("--checkpoints", str(plan.checkpoints))
            founder = await network.start("start", "--train", str(plan.recipe_file), *checkpoints, *shared)
            await network.start_all([joining(plan, founder.serving.invite)] * (n_nodes - 1))
            with trio.fail_after(_PATIENCE_S):
                while (window := window_of(_records(network, founder), wanted, n_steps, sequences)) is None:
                    check(network.nodes)
                    await trio.sleep(_LOOK_EVERY_S)
        finally:
            for node in network.nodes:
                node.kill()  # nobody needs the rest of the run
    return window


def check(nodes: Sequence[LocalNode]) -> None:
    """Raises CommandFailedError if one has ended."""
    for node in nodes:
        if node.process.poll() is not None:
            raise CommandFailedError(f"{node.name} ended with {node.process.returncode}: {node.last_words()}")


def _records(network: LocalNetwork, founder: LocalNode) -> list[StepMetrics]:
    return read_metrics(files_of(network.directory, bytes.fromhex(founder.serving.swarm)))


def window_of(records: Sequence[StepMetrics], wanted: tuple[int, ...], n_steps: int, n_sequences: int) -> Window | None:
    """The first `n_steps` steps in a row after those at the beginning, all of them made by `wanted` peers a stage.

    None while there are not so many.
    """
    whole = [record for record in records if record.peers == wanted][WARM_UP_STEPS:]
    if len(whole) <= n_steps:
        return None
    first, last = whole[0], whole[n_steps]
    if last.step - first.step != n_steps:
        raise CommandFailedError(f"between steps {first.step} and {last.step} a peer was missing")
    measured = whole[1 : n_steps + 1]
    return Window(
        n_steps,
        last.unix - first.unix,
        last.tokens - first.tokens,
        last.sent_bytes - first.sent_bytes,
        tuple(
            fmean(n_sequences * n_peers / record.stages[stage].sequences_per_s for record in measured)
            for stage, n_peers in enumerate(wanted)
        ),
        tuple(record.loss for record in records if record.loss is not None),
    )
