"""Expert parallelism: each rank computes with its experts and is sent their tokens, instead of gathering all experts.

The plan of a class (`base_model_ep_plan`) and the exchange of tokens are transformers' (5.23, `ep_dispatch_experts`,
`all_to_all`). Loading is ours, as for every sharded model (`sharding`): a rank reads the experts that it keeps, and
what it read is compared with a second reader. `DistributedConfig`'s own loading takes rows of FP8 matrices that begin
inside a block with another block's scales, and leaves adapters as copies whose gradients nobody reduces.

Ranks that follow each other form a group that holds each expert once (`ProcessLayout.expert`). Where a shard has
several groups, its ranks with the same experts cut them once more and gather them among themselves (FSDP2). Low-rank
updates are of the local experts alone: two grouped products before and after the activation, so what a rank does
follows its tokens. Factors that are trained are DTensors on (copies, experts) in PEFT's own layout: whole they are
what PEFT saves, under any layout.

Shapes: E experts, S rows (tokens times their experts), r rank, I in_features, O out_features.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from utils.exceptions import Problem
from utils.models import devices
from utils.models.parallel import launcher, ranks
from utils.models.parallel.shard_reading import Source
from utils.models.process_layout import ProcessLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GROUPED, DISPATCHED = "grouped_gemm", "ep_dispatch_experts"
NAME = "all_to_all_with_updates"
# grouped products take rows of whole so many bytes
_ROW_BYTES = 16
# where a tensor is held: (path, module, name in it), several where it is tied
Owners = list[tuple[str, torch.nn.Module, str]]
# (A (E, r, I), B (E, O, r), scale) of the local experts
Update = tuple[torch.Tensor, torch.Tensor, "float | torch.Tensor"]
# rows that this rank's experts computed in each exchange since they are counted
_rows = array("q")


@dataclass
class SharedExperts:
    """An experts module that ranks share: `parameters` are cut by expert; from `cut` on it has those from `first`."""

    parameters: tuple[str, ...]
    count: int
    first: int = 0
    kept: int = 0
    # parameter -> updates that are on it; set by who puts adapters on the model
    updates: Callable[[str], Sequence[Update]] = lambda parameter: ()
    # cuts the factors that are on it; set by who attaches adapters before the model is cut
    cut_factors: Callable[[DeviceMesh], None] | None = None


@dataclass(frozen=True)
class Meshes:
    """`factors` has the dimensions copies and experts; `same` are the ranks of a shard that have the same experts."""

    factors: DeviceMesh
    one: DeviceMesh
    same: DeviceMesh | None

    @classmethod
    def of(cls, layout: ProcessLayout) -> Meshes:
        from torch.distributed.device_mesh import init_device_mesh

        kind, each = devices.device().type, layout.shard // layout.expert
        factors = init_device_mesh(
            kind, (layout.processes // layout.expert, layout.expert), mesh_dim_names=("copies", "experts")
        )
        one = init_device_mesh(kind, (layout.processes, 1), mesh_dim_names=("all", "one"))["one"]
        if each == 1:
            return cls(factors, one, None)
        shape, names = (layout.replicate, each, layout.expert), ("replicate", "same", "experts_again")
        return cls(factors, one, init_device_mesh(kind, shape, mesh_dim_names=names)["same"])


def modules(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, tuple[str, ...]]]:
    """Path -> (experts module, its parameters that are cut by expert), as the plan of the model's class says."""
    plan: Mapping[str, str] = getattr(model, "_ep_plan", None) or {}
    experts = {}
    for path, module in model.named_modules():
        if plan.get(_pattern(path)) == DISPATCHED:
            names = [name for name in module._parameters if plan.get(_pattern(f"{path}.{name}")) == GROUPED]
            experts[path] = (module, tuple(names))
    return experts


def problems(model: torch.nn.Module, layout: ProcessLayout) -> list[Problem]:
    """Why the experts of this model cannot be shared as `layout` says; all reasons at once."""
    group, experts = layout.expert, modules(model)
    fix = "--run.expert_parallel off"
    problems = []
    if not layout.is_sharded:
        what = "run.expert_parallel: experts are shared by ranks that share the model, and here each has all of it"
        problems.append(Problem(what, group, f"launch it with a file that asks for FSDP (scripts/launch/), or {fix}"))
    elif layout.shard % group:
        what = f"run.expert_parallel: the {layout.shard} ranks that share the model are no whole number of groups"
        problems.append(Problem(what, group, f"a divisor of {layout.shard}, or {fix}"))
    if not experts:
        what = f"run.expert_parallel: transformers has no expert plan for {type(model).__name__}"
        problems.append(Problem(what, group, f"{fix}: layers are gathered (FSDP2)"))
    counts = {module._parameters[names[0]].shape[0] for module, names in experts.values() if names}
    if indivisible := sorted(count for count in counts if count % group):
        what = f"run.expert_parallel: {indivisible[0]} experts cannot be divided among {group} ranks"
        problems.append(Problem(what, group, f"a divisor of {indivisible[0]}, or {fix}"))
    if unlike := [path for path, (module, names) in experts.items() if not _is_known(module, names)]:
        what = f"run.expert_parallel: the forward pass of {type(experts[unlike[0]][0]).__name__} is one of its own"
        problems.append(Problem(what, unlike[:3], f"{fix}: layers are gathered (FSDP2)"))
    return problems


def mark(model: torch.nn.Module) -> bool:
    """Say of this model's experts that ranks share them, where the layout of this command does; whether they do."""
    layout = launcher.current()
    if layout.expert == 1 or ranks.size() == 1 or problems(model, layout):
        return False
    for module, names in modules(model).values():
        module.shared = SharedExperts(names, module._parameters[names[0]].shape[0])  # type: ignore[assignment]
    return True


def shared_in(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, SharedExperts]]:
    """The experts in a module that ranks share."""
    for part in module.modules():
        if isinstance(shared := part.__dict__.get("shared"), SharedExperts):
            yield part, shared


def cut(
    module: torch.nn.Module, meshes: Meshes, unread: Sequence[tuple[Owners, Source]], *, drops: bool
) -> list[tuple[Owners, Source]]:
    """Leave this rank its experts and their factors; from now on their forward pass sends tokens to the other ranks.

    `unread` are the placeholders of `module`, by the places that hold them; returned with those of experts from the
    first that this rank keeps.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel, EPImplementationInterface

    EPImplementationInterface.register(NAME, implementation())
    mesh, starts = meshes.factors["experts"], dict[tuple[int, str], int]()
    for experts, shared in shared_in(module):
        if shared.kept:  # with its layer
            continue
        shared.kept = shared.count // mesh.size()
        shared.first = mesh.get_local_rank() * shared.kept
        for name in shared.parameters:
            experts._parameters[name] = _own(experts._parameters[name], shared)
        experts.num_experts = shared.kept
        if shared.cut_factors is not None:
            shared.cut_factors(meshes.factors)
        EpDispatchExpertsParallel().install_forward(experts, ep_mesh=mesh, tp_mesh=meshes.one, ep_implementation=NAME)
        starts |= {(id(experts), name): shared.first for name in shared.parameters}
        if meshes.same is not None:
            fully_shard(experts, mesh=meshes.same, reshard_after_forward=drops)
    return [
        (owners, replace(source, first=starts.get((id(owners[0][1]), owners[0][2]), 0))) for owners, source in unread
    ]


def whole_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape (E, ...) over all ranks, of the experts in a module that ranks share."""
    return {
        f"{path}.{name}": (shared.count, *part._parameters[name].shape[1:])
        for path, part in module.named_modules()
        if (shared := part.__dict__.get("shared")) is not None
        for name in shared.parameters
    }


def parts(module: torch.nn.Module) -> set[torch.nn.Parameter]:
    """What FSDP2 must leave alone in a module: experts that this rank has whole, and factors of experts."""
    from torch.distributed.tensor import DTensor

    held = {experts._parameters[name] for experts, shared in shared_in(module) for name in shared.parameters}
    whole = {parameter for parameter in held if not isinstance(parameter, DTensor)}
    return whole | {parameter for parameter in module.parameters() if is_factor(parameter)}


def is_factor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a factor of experts that ranks share."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.mesh_dim_names == ("copies", "experts")


def own_part(experts: torch.nn.Module, tensor_Exx: torch.Tensor) -> torch.Tensor:
    """What is this rank's of a tensor over all experts of a module; all of it where they are not shared."""
    shared = experts.__dict__.get("shared")
    return tensor_Exx if shared is None else tensor_Exx[shared.first : shared.first + shared.kept]


def copied_factors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Factors of shared experts that are trained."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad and is_factor(p))


def group_index(module: torch.nn.Module) -> int:
    """Which of the parts that the experts are cut into this rank has; 0 where they are not."""
    return next((shared.first // shared.kept for _, shared in shared_in(module) if shared.kept), 0)


def factor(tensor: torch.Tensor, mesh: DeviceMesh, rank: int | None = None) -> torch.nn.Parameter:
    """This rank's part of a factor in PEFT's layout: A (E*r, I), or with `rank` B (O, r*E), whose experts alternate."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    place = Shard(0) if rank is None else _StridedShard(1, split_factor=rank)
    shard = distribute_tensor(tensor.detach(), mesh, [Replicate(), place], src_data_rank=None)
    local = shard.to_local().clone()  # a slice would hold on to the whole
    shard = DTensor.from_local(
        local, mesh, shard.placements, run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )
    return torch.nn.Parameter(shard, requires_grad=tensor.requires_grad)


def count_rows() -> None:
    """Count from here on what `rows_of_exchanges` tells."""
    del _rows[:]


def rows_of_exchanges() -> tuple[int, float]:
    """(largest, mean) rows that a rank's experts computed since they are counted; every rank has to ask.

    The largest is that of each exchange, added up: all ranks wait for the busiest one in every layer, and one that has
    much to do in one layer does not win it back in the next.
    """
    team, mine = ranks.team(), torch.tensor(_rows, dtype=torch.int64)
    everyone = [torch.zeros_like(mine) for _ in range(team.size)]
    dist.all_gather(everyone, mine, group=team.control)  # ranks exchange together, so equally often
    rows_RX = torch.stack(everyone)
    return int(rows_RX.amax(0).sum()), float(rows_RX.sum()) / team.size


def implementation() -> type:
    """transformers' exchange of tokens around the local experts with the updates that are on them."""
    from transformers.distributed.expert_parallel import AllToAllEP

    class AllToAllWithUpdates(AllToAllEP):
        def __init__(self, experts: torch.nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
            super().__init__(experts, ep_mesh, tp_mesh)
            plain = self.experts_forward

            def forward(x_SI: torch.Tensor, ids_S1: torch.Tensor, weights_S1: torch.Tensor) -> torch.Tensor:
                shared = experts.__dict__["shared"]
                updates = {name: shared.updates(name) for name in shared.parameters}
                if not any(updates.values()):
                    return plain(x_SI, ids_S1, weights_S1)
                return with_updates(experts, x_SI, ids_S1[:, 0], updates)

            self.experts_forward = forward

        def _dispatch_tokens(self, *arguments: torch.Tensor) -> Any:
            tokens = super()._dispatch_tokens(*arguments)
            if torch._C._current_graph_task_id() == -1:  # not where a backward pass computes it again
                _rows.append(len(tokens[0]))
            return tokens

    return AllToAllWithUpdates


def with_updates(
    experts: Any, x_SI: torch.Tensor, ids_S: torch.Tensor, updates: Mapping[str, Sequence[Update]]
) -> torch.Tensor:
    """Rows (S, I), each through the one expert it is for, whose weights have updates -> (S, I), in the same order.

    As transformers' `grouped_mm_experts_forward`; every factor has a part in the result, so each gets a gradient.
    """
    ids_S, order = torch.sort(ids_S)
    counts_E = torch.bincount(ids_S, minlength=experts.num_experts)
    ends_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.moe import _grouped_linear

        bias = getattr(experts, f"{name}_bias")[ids_S] if experts.has_bias else None
        weight = getattr(experts, name)
        y = _grouped_linear(x, weight, ends_E, bias=bias, is_transposed=experts.is_transposed)
        for a_ErI, b_EOr, scale in updates.get(name, ()):
            h_Sr = _grouped_linear(x, _aligned(a_ErI.to(y.dtype), dim=1), ends_E) * scale
            y = y + _grouped_linear(h_Sr.to(y.dtype), _aligned(b_EOr.to(y.dtype), dim=2), ends_E)
        return y

    y = product("gate_up_proj" if experts.has_gate else "up_proj", x_SI[order])
    y = product("down_proj", experts._apply_gate(y) if experts.has_gate else experts.act_fn(y))
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].to(x_SI.dtype)


def _aligned(factor_Exx: torch.Tensor, dim: int) -> torch.Tensor:
    """With as many zeros behind the ranks of `dim` as grouped products need: rows of whole 16 bytes."""
    missing = -factor_Exx.shape[dim] % (_ROW_BYTES // factor_Exx.element_size())
    padding = (0, missing) if dim == 2 else (0, 0, 0, missing)
    return torch.nn.functional.pad(factor_Exx, padding) if missing else factor_Exx


def _own(old: torch.nn.Parameter, shared: SharedExperts) -> torch.nn.Parameter:
    """This rank's experts of a parameter, without values where it has none yet."""
    # a slice would hold on to the whole
    return torch.nn.Parameter(old.detach()[shared.first : shared.first + shared.kept].clone(), requires_grad=False)


def _is_known(module: torch.nn.Module, names: Sequence[str]) -> bool:
    """Whether `with_updates` computes as this module does: one of transformers' experts, with two matrices each."""
    settings = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "_apply_gate")
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return {first, "down_proj"} <= set(names) and all(hasattr(module, setting) for setting in settings)


def _pattern(path: str) -> str:
    """A path as plans write it: with a star for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
