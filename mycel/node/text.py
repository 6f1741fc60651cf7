"""Text to tokens and back, on the client alone: tokenizer, streaming decoder, stop strings, chat template.

Files may come from peers: the tokenizer is data, and the template runs in jinja2's sandbox in a process of its own,
with at most 2 s of processor time, 512 MiB of memory, 4 million characters of text, and RENDER_PATIENCE_S in all.

Ring: shell (reads files, starts a process).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mycel.protocols.errors import ConfigError, one_line

MAX_TEMPLATE_CHARS = 200_000
RENDER_PATIENCE_S = 15.0
_RENDERER = Path(__file__).with_name("template_process.py")


@dataclass(frozen=True, slots=True)
class TextCodec:
    """A model's tokenizer and chat template. Make one with `load`."""

    tokenizer: Tokenizer
    config: dict[str, Any]
    template: str | None

    @classmethod
    def load(cls, directory: Path, vocab_size: int) -> TextCodec:
        """From a model directory. Raises ConfigError if there is no tokenizer.json or it does not fit the model."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{directory} has no tokenizer.json")
        with _refusing(f"{path} is not a tokenizer"):
            tokenizer = Tokenizer.from_file(str(path))
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if size > vocab_size:
            raise ConfigError(f"{path} is not this model's: it has {size} tokens, the model {vocab_size}")
        config = _json(directory / "tokenizer_config.json")
        template = _default_template(config.get("chat_template"))
        if (directory / "chat_template.jinja").is_file():
            template = _read(directory / "chat_template.jinja")
        usable = template is not None and len(template) <= MAX_TEMPLATE_CHARS
        return cls(tokenizer, config, template if usable else None)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a text (such as BOS)."""
        # Half a surrogate pair, as a terminal or a JSON file may give, is no text.
        sound = text.encode("utf-8", "replace").decode("utf-8")
        with _refusing("the tokenizer refused the text"):
            ids: list[int] = self.tokenizer.encode(sound, add_special_tokens=special).ids
        return ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks, by the model's template.

        Without a template the turns are written as plain `User:` and `Assistant:` lines. With one it takes some tenths
        of a second, and at worst RENDER_PATIENCE_S: not for an event loop. Raises ConfigError if the template refuses
        the messages or needs more than it may.
        """
        if self.template is None:
            turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
            return self.encode("\n".join([*turns, "Assistant:"]))
        tokens = {key: _token_text(value) for key, value in self.config.items() if key.endswith("_token")}
        variables = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
        text = _render(self.template, {**tokens, **variables})
        return self.encode(text, special=False)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        return TextStream(self, tuple(text for text in stop if text))


@dataclass(slots=True)
class TextStream:
    """Tokens in, text out as soon as it is certain: whole characters, and nothing of a stop string."""

    codec: TextCodec
    stop: tuple[str, ...]
    stopped: bool = False
    _tokens: list[int] = field(default_factory=list)
    _decoder: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))
    _decoded: str = ""
    _given: int = 0

    def push(self, token: int) -> str:
        """The text that `token` makes certain; "" while it may still change or be the beginning of a stop string."""
        self._tokens.append(token)
        self._decoded += self._decoder.step(self.codec.tokenizer, token) or ""
        return self._give(final=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        whole = self.codec.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._give(final=True)

    def _give(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        begins = [at for text in self.stop if (at := self._decoded.find(text, self._given)) >= 0]
        if begins:
            self.stopped = True
            until = min(begins)
        else:
            until = len(self._decoded) - (0 if final else self._held_back())
        text = self._decoded[self._given : until]
        self._given = max(until, self._given)
        return text

    def _held_back(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        tail = self._decoded[self._given :]
        longest = 0
        for text in self.stop:
            for n in range(min(len(text) - 1, len(tail)), longest, -1):
                if tail.endswith(text[:n]):
                    longest = n
                    break
        return longest


def _render(template: str, variables: dict[str, Any]) -> str:
    """The template's text, from a process that may fail, hang or be killed. Raises ConfigError if it does."""
    question = json.dumps({"template": template, "variables": variables})
    command = [sys.executable, "-I", str(_RENDERER)]  # -I: neither the environment nor this folder chooses its modules
    try:
        done = subprocess.run(
            command, input=question, capture_output=True, encoding="utf-8", timeout=RENDER_PATIENCE_S, check=False
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the chat template did not come to an end in {RENDER_PATIENCE_S:.0f} s") from None
    except OSError as error:
        raise ConfigError(f"the chat template cannot be used: {error.strerror}") from None
    except ValueError:
        raise ConfigError("the chat template needs more memory or time than a template may") from None
    if "text" not in answer:
        raise ConfigError(f"the chat template refused: {_short(str(answer.get('refused')))}")
    return str(answer["text"])


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever the tokenizers library makes of a file or a text that it cannot take, as one line."""
    try:
        yield
    except BaseException as error:
        # Its Rust code panics on some damaged files, which arrives as an exception that is none of `Exception`.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ConfigError(f"{what}: {_short(str(error))}") from None
        raise


def _short(text: str) -> str:
    """A foreign message as a part of one of our lines."""
    return one_line(" ".join(text.split()))[:160]


def _default_template(value: object) -> str | None:
    """The template in a tokenizer's configuration, which may name several."""
    if isinstance(value, list):
        named = [one for one in value if isinstance(one, dict) and one.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else None


def _token_text(value: object) -> str:
    return str(value["content"]) if isinstance(value, dict) and "content" in value else str(value or "")


def _read(path: Path, errors: str = "replace") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path, "strict"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {_short(str(error))}") from None
    return value if isinstance(value, dict) else {}
