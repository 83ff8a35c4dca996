"""How the ranks of a run share one model: a value, printed by the plan and recorded in manifests. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessLayout:
    """`replicate` groups of `shard` ranks; a group holds the weights once, in `shard` shards (FSDP2, HSDP).

    Inside a group every `expert` neighbours hold each expert once and send it its tokens, instead of gathering the
    weights of all experts; 1 gathers.
    """

    replicate: int = 1
    shard: int = 1
    expert: int = 1

    @property
    def processes(self) -> int:
        return self.replicate * self.shard

    @property
    def is_sharded(self) -> bool:
        return self.shard > 1

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process"
        if not self.is_sharded:
            return f"a full copy on each of {self.replicate} ranks"
        parts = f"sharded over {self.shard}"
        if self.expert > 1:
            parts += f", each expert once in {self.expert}"
        return parts if self.replicate == 1 else f"{parts}, {self.replicate} copies (HSDP)"
