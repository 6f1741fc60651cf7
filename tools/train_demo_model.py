"""Train the small Llama that ships inside the package, on the text of Python's own help topics.

One duty: from `pydoc_data.topics` (the text behind `help("for")`, PSF licence, in every Python) to a Hugging Face model
directory of at most 8 MB: tokenizer, config, float16 safetensors, README with every number of the run. It knows nothing
of the rest of Mycel, and nothing of Mycel imports it; the tests load its split to compute the held-out loss again.

    python tools/train_demo_model.py --out mycel/node/demo_model

Everything random comes from `--seed`, so the same machine type, versions (Python, torch, transformers, tokenizers) and
`--threads` give the same numbers. Another CPU rounds differently, another number of threads sums in another order, and
another Python has other help topics: then they move a little, and the README written says for what they hold. The
forward pass runs in bfloat16: half an hour on two cores that have instructions for it, several times that on others.

One file, longer than others here, so that it runs from a checkout of this file alone. Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"  # begins every document and ends it: one special token serves as bos, eos and padding
MAX_BYTES = 8_000_000
CONTEXT_TOKENS = 1024
HELD_OUT_CHUNK_CHARS = 1500
HELD_OUT_FRACTION = 0.05
# Windows of a training step, in turn. With long ones alone the model goes by the hundred tokens before and knows little
# to say after a short prompt (2.1 nats a token of the training text at position 8, 0.4 at 400), and prompts are short.
WINDOW_TOKENS = (64, 128, 64, 512, 64, 128, 64, CONTEXT_TOKENS)
SPLIT_SEED = 5  # apart from --seed: whatever the weights start from, the same text is held out

# Two that stand in the text, and one that does not.
PROMPTS = ("The for statement is used to", "A class definition", "When an exception is raised")


# ---- corpus: pure functions from the help topics to paragraphs and a split --------------------------------------


@dataclass(frozen=True, slots=True)
class Corpus:
    """The cleaned text: runs of consecutive paragraphs, those to train on and those never trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str
    """Of the raw topics, so that two Pythons with the same help text are known to be equal."""


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English: no grammar, doctest, table or heading, and it ends as a sentence does."""
    text = " ".join(paragraph.split())
    if any(mark in text for mark in (">>>", "::=", "->", "+--", "(Pdb)", " # ")) or text.startswith(tuple("|+#@")):
        return False
    if re.match(r"(?:async )?(?:def|class|import|from|print|try|while|for|if|return|del|with)\b", text) and (
        "):" in text or " = " in text
    ):
        return False  # an example
    if re.search(r"^( *)\S.*:\n\1 {3,}\S", paragraph, re.MULTILINE):
        return False  # an indented suite after a colon: an example too
    if text.startswith(("Changed in version", "New in version", "Deprecated since", "See also", "**PEP")):
        return False
    if not text.endswith((".", ":", ";", "?", "!", ")")) or len(text) < 30:
        return False
    common = re.findall(r"\b(?:the|a|an|is|are|of|to|in|be|by|and|or|this|that|with|for|as|if|it)\b", text.lower())
    return len(common) >= max(2, len(text.split()) // 8)


def clean(paragraph: str) -> str:
    """Undo line wrapping and the marks of reStructuredText, so that the text reads as plain prose."""
    text = " ".join(paragraph.split())
    for typeset, plain in (("\u2019", "'"), ("\u2018", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2026", "...")):
        text = text.replace(typeset, plain)
    text = re.sub(r" \[\d+\](?=$|[ .,;:)])", "", text)  # footnote marks
    text = re.sub(r'"([^"\n]+)"', r"\1", text)  # literals stand in double quotes in the plain-text topics
    text = re.sub(r"([a-z])- (?=[a-z])(?!and |or )", r"\1-", text)  # a line was broken after a hyphen
    text = re.sub(r"\*\*([A-Z][\w :']*)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*([A-Za-z_][\w. -]*)\*(?![\w*])", r"\1", text)  # emphasis
    return re.sub(r"^(?:\*|\d+\.|\[\d+\]) ", "", text)  # list marks


def paragraphs(topic: str) -> list[str]:
    """The prose of one topic, in order; a signature on a line of its own is joined to the paragraph it explains."""
    out: list[str] = []
    signature = ""
    for block in re.split(r"\n\s*\n", topic):
        line = block.strip()
        if re.fullmatch(r"(?:async )?[\w.]+\([^()\n]*\)", line):
            signature = clean(line)
            continue
        if is_prose(block):
            text = clean(block)
            out.append(f"{signature}: {text}" if signature else text)
        elif out and out[-1].endswith(":"):
            # The example that this sentence announced is not prose and is left out: the sentence goes or ends.
            head, _, last = re.sub(r",? for (?:example|instance)$", "", out[-1][:-1]).rpartition(". ")
            kept = head if head and len(last.split()) < 5 else f"{head}. {last}" if head else last
            out[-1] = kept.rstrip(".") + "."
        signature = ""
    return out


def load_corpus() -> Corpus:
    """Clean, drop repeated paragraphs, and hold out about 5 % as contiguous chunks, before anything else is done.

    Topics contain each other ("for" stands again inside "compound"), so a paragraph counts once, in the longest topic
    that has it; otherwise most of the held-out text would also be trained on.
    """
    raw = "\0".join(f"{name}\0{topics[name]}" for name in sorted(topics))
    seen: set[str] = set()
    chunks: list[tuple[int, str]] = []  # (topic number, consecutive paragraphs of about HELD_OUT_CHUNK_CHARS)
    for number, name in enumerate(sorted(topics, key=lambda name: (-len(topics[name]), name))):
        current: list[str] = []
        for text in paragraphs(topics[name]):
            key = re.sub(r"\W+", " ", text.lower())
            if key in seen:
                continue
            seen.add(key)
            current.append(text)
            if sum(map(len, current)) >= HELD_OUT_CHUNK_CHARS:
                chunks.append((number, "\n\n".join(current)))
                current = []
        if current:
            chunks.append((number, "\n\n".join(current)))
    count = max(1, round(len(chunks) * HELD_OUT_FRACTION))
    held = set(random.Random(SPLIT_SEED).sample(range(len(chunks)), count))
    train: list[str] = []
    before: int | None = None  # the topic of the chunk just before, while nothing was held out in between
    for index, (number, text) in enumerate(chunks):
        if index in held:
            before = None
            continue
        if number == before:
            train[-1] += "\n\n" + text
        else:
            train.append(text)
        before = number
    return Corpus(tuple(train), tuple(chunks[i][1] for i in sorted(held)), hashlib.sha256(raw.encode()).hexdigest())


# ---- tokenizer and model ----------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any string round-trips; every encoding begins with END unless special tokens are switched off."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def make_config(vocab_size: int) -> LlamaConfig:
    """Eight blocks, so that four nodes serve two each; grouped-query attention and tied embeddings keep it small."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )


def add_dropout(model: LlamaForCausalLM, rate: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Dropout after the embedding and at the end of each branch; Llama itself has it on attention weights alone."""

    def hook(module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, rate, training=module.training)

    branches = [m for n, m in model.named_modules() if n.endswith(("o_proj", "down_proj", "embed_tokens"))]
    return [module.register_forward_hook(hook) for module in branches]


# ---- loss and batches -------------------------------------------------------------------------------------------


@torch.no_grad()
def text_loss(model: torch.nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Mean negative log-likelihood in nats per token; each text is read by itself, END first and END last.

    Texts longer than the context are read in windows of it, each with END in front.
    """
    model.eval()
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
        for start in range(0, len(ids), CONTEXT_TOKENS - 1):
            window_T = torch.tensor([0, *ids[start : start + CONTEXT_TOKENS - 1]])
            logits = model(input_ids=window_T[None, :-1]).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, window_T[1:], reduction="sum").item()
            count += len(window_T) - 1
    return total / count


class Windows:
    """Endless training windows, each beginning with END where a prompt would begin: at a paragraph or a sentence.

    A fixed grid would show the same tokens at the same positions in every epoch; random beginnings make many different
    windows of a small corpus, and none begins in the middle of a sentence, as no prompt does.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._paragraphs = [(t, m.end()) for t in texts for m in re.finditer(r"\A|\n\n", t)]
        self._sentences = [(t, m.end()) for t in texts for m in re.finditer(r"\A|\n\n|(?<=[a-z)]\.) +(?=[A-Z])", t)]

    def window(self, tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < tokens:
            text, start = self._rng.choice(self._paragraphs if self._rng.random() < 0.5 else self._sentences)
            # No token is longer than 16 characters on average, and what is left over is cut.
            piece = text[start : start + 16 * tokens]
            ids += [0, *self._tokenizer.encode(piece, add_special_tokens=False).ids]
        return ids[:tokens]

    def batch(self, size: int, tokens: int) -> torch.Tensor:
        return torch.tensor([self.window(tokens) for _ in range(size)])


# ---- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the result, apart from the corpus."""

    seed: int
    steps: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    dropout: float
    noise: float
    """Share of input tokens replaced by random ones (never of targets): the model learns to go on after a slip."""
    vocab_size: int


def train(
    model: LlamaForCausalLM, windows: Windows, recipe: Recipe, each: Callable[[int, float], None], every: int
) -> None:
    """AdamW with a short warm-up and a cosine to zero; calls `each(step, mean training loss)` every `every` steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    warm_up = min(100, recipe.steps // 10 + 1)
    handles = add_dropout(model, recipe.dropout)
    recent = 0.0
    for step in range(recipe.steps):
        progress = step / recipe.steps
        scale = min((step + 1) / warm_up, 0.5 * (1.0 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * scale
        tokens = WINDOW_TOKENS[step % len(WINDOW_TOKENS)]
        ids_BT = windows.batch(max(1, recipe.batch_tokens // tokens), tokens)
        noisy_BT = torch.where(
            torch.rand(ids_BT.shape) < recipe.noise, torch.randint(1, recipe.vocab_size, ids_BT.shape), ids_BT
        )
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=noisy_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += loss.item()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            each(step + 1, recent / ((step % every) + 1))
            recent = 0.0
    for handle in handles:
        handle.remove()
    model.eval()


# ---- what is written --------------------------------------------------------------------------------------------


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """A Hugging Face model directory: weights in float16, to be computed in float32 (so says `dtype` of the config)."""
    out.mkdir(parents=True, exist_ok=True)
    # The head is the embedding again, and a tied tensor is stored once. Two more bytes a weight would buy nothing.
    tensors = {n: t.detach().half().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file makes it readable by its owner alone
    size_bytes = (out / "model.safetensors").stat().st_size
    if size_bytes > MAX_BYTES:
        raise SystemExit(f"model.safetensors has {size_bytes} bytes, more than {MAX_BYTES}")
    model.config.dtype = "float32"
    model.config.save_pretrained(out)
    GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.1,
        max_new_tokens=120,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def write(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, seed: int | None) -> str:
    """About 100 tokens after a prompt: greedy without a seed, by the recommended sampling with one."""
    ids_BT = torch.tensor([tokenizer.encode(prompt).ids])
    options: dict[str, object] = {"max_new_tokens": 110, "repetition_penalty": 1.1, "pad_token_id": 0}
    if seed is None:
        options |= {"do_sample": False, "temperature": None, "top_p": None}
    else:
        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    out_BT = cast(Any, model).generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    return str(tokenizer.decode(out_BT[0].tolist()))


def copied_share(text: str, corpus: Sequence[str], words: int = 8) -> float:
    """Share of the runs of eight words that stand word for word in the training text: recalled, not composed."""
    known = " " + " ".join(" ".join(corpus).split()) + " "
    parts = text.split()
    runs = [" " + " ".join(parts[i : i + words]) + " " for i in range(len(parts) - words + 1)]
    return sum(run in known for run in runs) / max(1, len(runs))


def report(out: Path, facts: dict[str, object], samples: Sequence[tuple[str, str]]) -> None:
    """Write `training.json` (for the test and for machines) and README.md (the same numbers for people)."""
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    texts = "\n\n".join(f"{how}\n\n" + "\n".join(f"> {line}".rstrip() for line in t.split("\n")) for how, t in samples)
    (out / "README.md").write_text(README.format(samples=texts, **facts), encoding="utf-8")


README = """\
# The model inside the package

A Llama of {parameters:,} parameters ({blocks} blocks, hidden size 192, grouped-query attention, byte-level BPE of
{vocab_size:,} tokens), so that Mycel's demo speaks with no download. It writes English prose about Python. It is a toy:
it has read one small manual until it knew it almost by heart. After a prompt that begins as a sentence of the manual
does it recites; after others it strings pieces together, and what they say may be false. It answers no questions.

A good prompt: `{prompt}`.

- Made by `tools/train_demo_model.py --seed {seed} --steps {steps}` (the other values of the recipe: `training.json`),
  {minutes} minutes on {threads} thread(s).
- Text: `pydoc_data.topics` of Python {corpus_python}, SHA-256 of the raw topics `{corpus_sha256}`; cleaned to
  {train_chars:,} characters of prose ({train_tokens:,} tokens) to train on, each paragraph once.
- Held out: {held_out_chars:,} characters ({held_out_tokens:,} tokens) in contiguous chunks, taken away before the
  tokenizer was trained and never trained on. Their loss, with the weights as stored:
  **{held_out_loss:.4f} nats a token, perplexity {held_out_perplexity:.1f}**, {held_out_bits_per_char:.3f} bits a
  character. The loss on the training text is {train_loss:.4f}. {choice}
- Of the runs of eight words in the samples below, {copied_percent} % stand word for word in the training text.
- The same script with the same seed gives the same numbers on the same machine type with the same versions
  (Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}, {machine}) and number of
  threads. Another CPU rounds differently; another Python has other help topics.
- Stored in float16, meant to be computed in float32 (`dtype` in `config.json`). It was trained on windows of 64 to
  1,024 tokens; past 1,024 it is lost. `generation_config.json` recommends temperature 0.7, top-p 0.9 and a repetition
  penalty of 1.1.

Licence: the help topics are part of Python and its documentation, copyright the Python Software Foundation, under the
PSF License Agreement version 2 (`LICENSE-PSF.txt`). The weights and the vocabulary are derived from that text and come
under the same terms; the changes made to it are those above.

## Samples

{samples}
"""


def describe(corpus: Corpus, tokenizer: Tokenizer, model: LlamaForCausalLM, recipe: Recipe) -> dict[str, object]:
    """The facts of a finished run; the losses are those of `model`, which is the stored one read back."""
    held_out_tokens = sum(len(tokenizer.encode(text).ids) for text in corpus.held_out)
    held_out_chars = sum(map(len, corpus.held_out))
    held_out_loss = text_loss(model, tokenizer, corpus.held_out)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return asdict(recipe) | {
        "prompt": PROMPTS[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": model.config.num_hidden_layers,
        "held_out_loss": held_out_loss,
        "held_out_perplexity": math.exp(held_out_loss),
        "held_out_bits_per_char": held_out_loss * held_out_tokens / held_out_chars / math.log(2),
        "held_out_tokens": held_out_tokens,
        "held_out_chars": held_out_chars,
        "train_loss": text_loss(model, tokenizer, corpus.train),
        "train_tokens": sum(len(tokenizer.encode(text).ids) for text in corpus.train),
        "train_chars": sum(map(len, corpus.train)),
        "corpus_sha256": corpus.sha256,
        "corpus_python": platform.python_version(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=2, help="torch threads; other numbers sum in another order")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements of the held-out loss")
    options = vars(parser.parse_args())
    out, threads, every = options.pop("out"), options.pop("threads"), options.pop("every")
    recipe = Recipe(**options)

    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    model = LlamaForCausalLM(make_config(tokenizer.get_vocab_size()))
    began = time.monotonic()
    curve: list[tuple[int, float, float]] = []

    def each(step: int, train_loss: float) -> None:
        held_out_loss = text_loss(model, tokenizer, corpus.held_out)
        curve.append((step, round(train_loss, 4), round(held_out_loss, 4)))
        print(
            f"{time.monotonic() - began:6.0f} s  step {step}  train {train_loss:.4f}  held out {held_out_loss:.4f}",
            flush=True,
        )

    train(model, Windows(corpus.train, tokenizer, recipe.seed), recipe, each, every)
    minutes = round((time.monotonic() - began) / 60, 1)
    save(out, model, tokenizer)

    stored = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    samples = [(f"Greedy, `{PROMPTS[0]}`:", write(stored, tokenizer, PROMPTS[0], None))]
    samples += [(f"Sampled (seed 1), `{p}`:", write(stored, tokenizer, p, 1)) for p in PROMPTS[1:]]
    copied = sum(copied_share(text, corpus.train) for _, text in samples) / len(samples)
    best = min(curve, key=lambda row: row[2])
    choice = (
        f"The held-out loss was least, {best[2]:.4f}, at step {best[0]}; the last step is kept: it writes better."
        " Of text that it has not seen it knows little."
    )
    facts = describe(corpus, tokenizer, stored, recipe)
    facts |= {"minutes": minutes, "threads": threads, "copied_percent": round(100 * copied), "choice": choice}
    report(out, facts | {"curve_step_train_held_out": curve}, samples)
    print("\n\n".join(f"{how}\n{text}" for how, text in samples))


if __name__ == "__main__":
    main()
