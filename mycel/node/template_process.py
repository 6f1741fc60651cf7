"""Renders a chat template in a process of its own: a program, started by `text.py`, that imports nothing of Mycel.

Templates come from peers. jinja2's sandbox keeps them from attributes, but a few words of one can ask for any amount of
memory or time, in many ways (`"a" * 10**10`, a loop in a loop, text doubled forty times), and no list of forbidden
words is ever complete. A process has limits that the system keeps.

stdin: JSON {"template", "variables"}; stdout: JSON {"text"} or {"refused"}.

Ring: shell.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CPU_S = 2
MAX_MEMORY_BYTES = 512 * 2**20
MAX_TEXT_CHARS = 4_000_000


def limit() -> None:
    """Give this process its limits, where the system knows them; elsewhere the parent's deadline has to do."""
    if sys.platform == "win32":
        return
    import resource

    for kind, most in ((resource.RLIMIT_CPU, MAX_CPU_S), (resource.RLIMIT_AS, MAX_MEMORY_BYTES)):
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # a system may know a limit and not keep it
            continue


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a template, with what the templates of Hugging Face models expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _today
    environment.filters["tojson"] = _to_json
    return environment.from_string(template).render(**variables)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _today(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def main() -> None:
    """Answer the one question on stdin."""
    limit()
    request = json.load(sys.stdin)
    try:
        text = render(request["template"], request["variables"])
        too_long = len(text) > MAX_TEXT_CHARS
        answer = {"refused": f"it wrote {len(text)} characters"} if too_long else {"text": text}
    except MemoryError:
        answer = {"refused": "it asked for too much memory"}
    except Exception as error:  # noqa: BLE001  the root of this process: whatever a template raises refuses it
        answer = {"refused": str(error)[:400] or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
