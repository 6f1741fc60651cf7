"""The chaotic side of `mycel up`: links made worse, nodes killed by a seeded schedule, load, and a verdict.

The clients are in this process, each with an identity and links of its own; the nodes are processes. What the verdict
is stands in verdict.py, and which faults happen when in swarm/chaos.py.

Ring: shell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from mycel.cli.chaos_options import CLIENTS, Chaos
from mycel.cli.common import say, write
from mycel.cli.exits import FAILURE, NodeFailedError
from mycel.cli.verdict import Answer, Gone, Injected, as_json, cause, judge, pause_s, verdict_rows
from mycel.protocols.errors import MycelError
from mycel.swarm.chaos import Fault, Schedule, plan_faults

if TYPE_CHECKING:
    from mycel.cli.processes import LocalNetwork, LocalNode
    from mycel.cli.up import LocalPlan
    from mycel.node.client import Model
    from mycel.protocols.messages import SamplingParams

PATIENCE_S = 60.0
TOKENS = (20, 60)
# Without --for, so long a schedule is drawn.
_FOREVER_S = 86_400.0
_STARTS = 5
_RETRY_S = 1.0
# Beginnings of sentences that the model inside the package knows; any other model can continue them as well.
PROMPTS = (
    "The for statement is used to",
    "A class definition",
    "When an exception is raised",
    "A generator function",
)


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, how it is continued, and what one process alone says to it."""

    text: str
    how: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tokens: tuple[int, ...]


@dataclass(eq=False, slots=True)
class ChaosRun:
    """One run: `play` it on a network, then `conclude`, also after it was interrupted."""

    plan: LocalPlan
    chaos: Chaos
    directory: Path
    schedule: Schedule
    answers: list[Answer] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _began_s: float = 0.0
    _nodes: Sequence[LocalNode] = ()
    _away: set[int] = field(default_factory=set)
    _changed: trio.Event = field(default_factory=trio.Event)

    @classmethod
    def planned(cls, plan: LocalPlan, chaos: Chaos, directory: Path) -> ChaosRun:
        """With its schedule. Raises ConfigError if no node could ever be spared."""
        schedule = plan_faults(
            chaos.rates,
            plan.spans,
            until_s=chaos.for_s or _FOREVER_S,
            rng=Random(f"faults {chaos.seed}"),
            spare_last=not chaos.last_too,
        )
        return cls(plan, chaos, directory, schedule)

    # ---- the whole walk

    async def play(self, network: LocalNetwork, nodes: Sequence[LocalNode]) -> None:
        """Connect the clients, find out what is right, then load and faults side by side until the time is over."""
        from mycel.cli.up import best_invite, node_lines
        from mycel.node.background import background
        from mycel.node.client import connect

        self._nodes = nodes
        for line in node_lines(nodes):
            say(line)
        shape, n_clients = str(self.chaos.shape), self.chaos.load or CLIENTS
        async with AsyncExitStack() as stack:
            models: list[Model] = []
            for number in range(n_clients):
                cache = self.directory / f"client-{number + 1}"
                models.append(
                    await stack.enter_async_context(connect(best_invite(nodes), cache_dir=cache, shape=shape))
                )
            tasks = await self._tasks(models[0])
            self._say_plan(n_clients)
            self._began_s = trio.current_time()
            try:
                async with background() as around:
                    around.start_soon(self._inject_all, network)
                    async with trio.open_nursery() as clients:
                        for number, model in enumerate(models, 1):
                            clients.start_soon(self._ask_on, number, model, tasks)
            finally:
                self.seconds = self._now()

    def conclude(self, code: int, *, as_object: bool) -> int:
        """Tell the verdict; the exit code of the command, `code` being that of a signal, or 0."""
        from mycel.cli.answers import columns

        if code and not self.answers:
            return code  # interrupted before there was anything to judge
        verdict = judge(self.answers, self.injected, self.seconds, self.crashes)
        n_late = 0 if code else len(self.schedule.faults) - len(self.injected)
        if n_late:
            say(f"{n_late} of {len(self.schedule.faults)} faults waited for other nodes until the time was over")
        if as_object:
            value = {**as_json(verdict), "seed": self.chaos.seed, "interrupted": bool(code), "faults_left_out": n_late}
            write(json.dumps(value) + "\n")
        else:
            write("".join(line + "\n" for line in columns(verdict_rows(verdict))))
        return FAILURE if verdict.broken or not (verdict.ok or code) else code

    def _say_plan(self, n_clients: int) -> None:
        chaos = self.chaos
        until, faults = "until Ctrl-C", ""
        if chaos.for_s is not None:
            until, faults = f"for {chaos.for_s:g} s", f", {len(self.schedule.faults)} faults"
            for sentence in self.schedule.left_out:
                say(f"left out: {sentence}")
        links = "as they are" if chaos.shape.is_plain else chaos.shape.shown
        say(f"{n_clients} clients ask {until}, seed {chaos.seed}{faults}; links: {links}")

    def _now(self) -> float:
        return trio.current_time() - self._began_s

    def _tell(self, text: str) -> None:
        say(f"{self._now():7.1f} s  {text}")

    # ---- load

    async def _tasks(self, model: Model) -> list[Task]:
        """Greedy and sampled continuations, computed here by the whole model."""
        return await trio.to_thread.run_sync(self._compute_tasks, model)

    def _compute_tasks(self, model: Model) -> list[Task]:
        import torch

        from mycel.node.reference import Reference
        from mycel.protocols.messages import SamplingParams

        torch.set_num_threads(1)
        manifest = model.manifest
        whole = Reference(self.plan.model, manifest.n_blocks, manifest.dtype)
        rng = Random(f"tasks {self.chaos.seed}")
        tasks = []
        for text in PROMPTS:
            seed = rng.randrange(2**31)
            sampled = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=seed)
            for how, sampling in (("greedy", SamplingParams()), (f"seed {seed}", sampled)):
                prompt = tuple(model.encode(text))
                tokens = whole.generate(
                    prompt, TOKENS[1], sampling, manifest.eos_token_ids, trio.from_thread.check_cancelled
                )
                tasks.append(Task(text, how, prompt, sampling, tokens))
        return tasks

    async def _ask_on(self, number: int, model: Model, tasks: Sequence[Task]) -> None:
        """One client: one request after the other until the time is over."""
        rng = Random(f"client {self.chaos.seed} {number}")
        while self.chaos.for_s is None or self._now() < self.chaos.for_s:
            await self._ask(number, model, rng.choice(tasks), rng.randint(*TOKENS))

    async def _ask(self, number: int, model: Model, task: Task, n_tokens: int) -> None:
        what = f'"{task.text}" ({task.how}, {n_tokens} tokens)'
        answer = Answer(number, what, task.tokens[:n_tokens], self._now())
        self.answers.append(answer)
        try:
            async with model.generate(
                task.prompt, max_new_tokens=n_tokens, sampling=task.sampling, patience_s=PATIENCE_S
            ) as generation:
                try:
                    async for piece in generation:
                        for gone in answer.note(piece.token, generation.trace, self._now()):
                            self._tell_gone(answer, gone)
                finally:
                    answer.note_route(generation.trace, len(answer.tokens))
                answer.finish = generation.finish
        except MycelError as error:
            answer.error = str(error) or type(error).__name__
            self._tell(f"client {number}: FAILED {what}: {answer.error}")
        if answer.difference:
            self._tell(f"client {number}: WRONG: {answer.difference}")

    def _tell_gone(self, answer: Answer, gone: Gone) -> None:
        who = f"client {answer.client}: {self._name(gone.peer)}"
        fault = cause(gone, answer, self.injected)
        pause = pause_s(gone, answer, fault) if fault is not None else None
        if gone.planned:
            self._tell(f"{who} handed over: {gone.reason}")
        elif fault is not None and pause is not None:
            self._tell(f"{who} replaced: {gone.reason}; next token {pause:.2f} s after the {fault.kind}")
        else:
            self._tell(f"{who} replaced, though nothing was done to it: {gone.reason}")

    def _name(self, peer: str) -> str:
        from mycel.swarm.view import short_id

        named = [node.name for node in self._nodes if node.serving.peer == peer]
        return named[0] if named else short_id(peer)

    # ---- faults

    async def _watch(self, node: LocalNode) -> None:
        """Tell when a node ends that nobody asked to."""
        code = await node.process.wait()
        if not node.expected:
            last = node.last_words(1)
            self.crashes.append(f"{node.name} ended by itself with exit code {code}: {last[0] if last else 'no word'}")
            self._tell(self.crashes[-1])

    async def _inject_all(self, network: LocalNetwork) -> None:
        async with trio.open_nursery() as nursery:
            for node in self._nodes:
                nursery.start_soon(self._watch, node)
            for fault in self.schedule.faults:
                await trio.sleep_until(self._began_s + fault.at_s)
                nursery.start_soon(self._inject, network, fault, nursery)

    async def _inject(self, network: LocalNetwork, fault: Fault, nursery: trio.Nursery) -> None:
        """One fault, and its end. It waits while a node is still away that was to be back by now."""
        node = self._nodes[fault.node]
        if not self._may_go(fault.node):
            self._tell(f"{node.name} ({node.blocks}): its {fault.kind} waits until other nodes are back")
            while not self._may_go(fault.node):
                await self._changed.wait()
        self._away.add(fault.node)
        self.injected.append(Injected(self._now(), fault.kind, node.serving.peer))
        if fault.kind == "stop":
            await self._stop_for(node, fault.away_s)
        else:
            await self._end(node, fault)
            await trio.sleep(fault.away_s)
            if not await self._bring_back(network, node):
                return  # it stays away: the others that serve its blocks are to be spared
            nursery.start_soon(self._watch, node)
        self._away.discard(fault.node)
        self._changed.set()
        self._changed = trio.Event()

    def _may_go(self, index: int) -> bool:
        """Whether a node is there, and others hold its blocks."""
        start, end = self.plan.spans[index]
        others = [span for i, span in enumerate(self.plan.spans) if i != index and i not in self._away]
        spared = all(any(a <= block < b for a, b in others) for block in range(start, end))
        return index not in self._away and (spared or self.chaos.last_too)

    async def _stop_for(self, node: LocalNode, seconds: float) -> None:
        self._tell(f"{node.name} ({node.blocks}) stands still for {seconds:.1f} s")
        node.freeze()
        try:
            await trio.sleep(seconds)
        finally:
            node.thaw()
        self._tell(f"{node.name} goes on")

    async def _end(self, node: LocalNode, fault: Fault) -> None:
        if fault.kind == "kill":
            node.kill()
            self._tell(f"{node.name} ({node.blocks}) killed")
            return
        self._tell(f"{node.name} ({node.blocks}) is asked to leave")
        began_s = self._now()
        went = await node.leave()
        took = f"after {self._now() - began_s:.1f} s"
        self._tell(f"{node.name} has left {took}" if went else f"{node.name} did not leave: killed {took}")

    async def _bring_back(self, network: LocalNetwork, node: LocalNode) -> bool:
        """Start it again. It joins through any that is there, which may itself be killed meanwhile: then once more."""
        began_s = self._now()
        model = ("--model", str(self.plan.model), *self.plan.shared, "--blocks", node.blocks)
        for _ in range(_STARTS):
            there = [other for index, other in enumerate(self._nodes) if index not in self._away]
            invite = (there or self._nodes)[-1].serving.invite
            try:
                await network.restart(node, "join", invite, *model)
            except NodeFailedError as error:
                node.kill()
                self._tell(f"{node.name} could not start again: {error}")
                await trio.sleep(_RETRY_S)
                continue
            self._tell(f"{node.name} is back; it took {self._now() - began_s:.1f} s to start")
            return True
        self.crashes.append(f"{node.name} could not be started again in {_STARTS} attempts")
        return False
