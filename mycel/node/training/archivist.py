"""Makes a machine's checkpoints whole: parts of other stages are fetched from their peers and written beside its own.

Nodes that share a directory write a stage each, and nothing needs to be fetched: so it waits a while before it asks.

Ring: shell.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from mycel.node.events import EventSink
from mycel.node.training.checkpoint_layout import MAX_MOMENTS, StageFiles
from mycel.node.training.state_fetch import fetch_state
from mycel.node.training.workshop import TorchWorkshop
from mycel.protocols.errors import ConfigError, PeerError
from mycel.protocols.ports import Transport
from mycel.swarm.training.members import Members

__all__ = ["Archivist"]

# For those who share the directory to write theirs.
GRACE_S = 6.0
LOOK_S = 2.0


@dataclass(eq=False, slots=True)
class Archivist:
    """For a node whose checkpoints are to be whole. `run` it beside the training."""

    transport: Transport
    members: Members
    workshop: TorchWorkshop
    event: EventSink

    async def run(self) -> None:
        """Look for ever whether a checkpoint lacks parts. A version is tried once: the next comes soon."""
        tried = 0
        while True:
            await trio.sleep(LOOK_S)
            version = self.workshop.kept
            if version <= max(tried, self.workshop.whole):
                continue
            await trio.sleep(GRACE_S)
            if self.workshop.whole >= version:
                continue  # those who share the directory have written theirs
            tried = version = self.workshop.kept  # the newest: peers hold few
            try:
                await self._complete(version)
            except (PeerError, ConfigError) as error:
                self.event("checkpoint.incomplete", version=version, reason=str(error))

    async def _complete(self, version: int) -> None:
        checkpointer = self.workshop.checkpointer
        if checkpointer is None or checkpointer.kept < version:
            return  # the node has changed its stage
        for stage in sorted(await checkpointer.missing_parts(version)):
            files = self.workshop.files(stage, await trio.to_thread.run_sync(self.workshop.layout, stage))
            donors = [(m.peer, version) for m in self.members.of_stage(stage) if m.version >= version]

            def fits(size_bytes: int, files: StageFiles = files) -> bool:
                whole, rest = divmod(size_bytes, 4 * files.n_elements)
                return not rest and 1 <= whole <= 1 + MAX_MOMENTS

            fetched = await fetch_state(
                self.transport, self.members.run, stage, donors, self.event, fits=fits, version=version
            )
            await checkpointer.add(files, version, fetched.data)
