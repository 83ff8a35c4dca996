"""What a base model honours when several pieces share a row: measured on the model itself, once, and remembered.

A small model of at least one decoder layer of each kind computes in float32, with every window shortened so that a
prompt can be longer. Two documents in a row are compared with each alone, candidates that share a prompt with each
alone, our output head with the model's own logits. A way that moves a token by more than TOLERANCE is not used.
Flash attention has no float32: there the attention blocks alone compute in bfloat16, and hidden states are compared.

Shape suffixes: B rows, T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from config import BaseModelSection
from utils.artifacts import files, resumable
from utils.exceptions import ArtefactError, Problem, is_out_of_memory
from utils.logger import event, warning
from utils.models import devices, float32_model, loading, losses
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.models.rows import row_layouts, row_support
from utils.models.rows.row_support import ALONE, CANDIDATES, PACKING, RowSupport, Way
from utils.models.weights import layer_sample
from utils.models.weights.safetensors_io import Checkpoint
from utils.models.weights.tensor_names import decoder_list, number_in

# raised when the same model would be measured otherwise
METHOD = 1
# nats by which sharing a row may move a token in float32, where rounding moves it by 1e-6 to 1e-5
TOLERANCE = 1e-4
# a leak has to be this many times larger than what is allowed, or the model would hide it
SIGHT = 10
# of hidden states, root mean square, relative; bfloat16 alone moves them by up to 0.01
BFLOAT16_TOLERANCE = 0.05
# key of what the tokens after a row's last one move
AHEAD = "padding"
# in place of NaN and infinity, which JSON does not have
UNLIKE = 1e9
# of the largest logit, between our head's logits and the model's
SAME_LOGITS = 1e-5
# tokens of the shortened windows; the pieces are longer and shorter than it. With few learnt positions all is a quarter
WINDOW = 64
# keys of what this process has said
_mentioned: set[str] = set()
_WINDOWS = re.compile(r"window|attention_chunk|local_attention")
_NO_WINDOWS = re.compile(r"layer|pattern|type|max_window|num_")


def measured(base: BaseModel, section: BaseModelSection) -> RowSupport:
    """What the model honours with this attention implementation on this device; measured where it is not known yet.

    What cannot be measured is not used, and said. Raises ArtefactError for a model that looks ahead.
    """
    of = _key(base, section)
    if base.cache is None:
        return _said(_measured(base, section, None), of)
    path = base.cache.with_name(".rows") / f"{of[:32]}.json"
    files.make_directory(path.parent)
    with files.locked(path.parent / "probe", "the probe of the base model", waits=True):
        found = resumable.read(path, of)
        if found is None:
            support = _measured(base, section, path.parent / "sample")
            if not support.why:  # what was out of reach may be within it next time
                resumable.write(path, support.to_json(), of)
            return _said(support, of)
    return _said(RowSupport(**found), of)


def load_model(base: BaseModel, section: BaseModelSection) -> Any:
    """The frozen base model, which from then on gets rows as it was measured to honour them. Errors as `loading`'s."""
    support = measured(base, section)
    model = loading.load_model(base, section)
    row_support.attach(model, support)
    return model


def _key(base: BaseModel, section: BaseModelSection) -> str:
    """What a measurement holds for."""
    import transformers

    where = [section.attention, transformers.__version__, devices.device().type]
    return files.fingerprint([METHOD, base.digest, base.quantization, *where])


@dataclass(frozen=True)
class _Texts:
    """Token ids that are compared: documents as (first row, second row), and prompts with their candidates."""

    rows: list[list[list[int]]]
    items: list[tuple[list[int], list[list[int]]]]

    @property
    def pieces(self) -> list[list[int]]:
        return [piece for row in self.rows for piece in row]


def measure(model: Any, *, vocabulary: int, skipped: Sequence[int] = (), size: int = 4) -> RowSupport:
    """What a loaded float32 model honours, its windows not longer than 16 * `size` tokens.

    `why` is set when what follows a token changes it: that is no causal language model.
    """
    texts = _texts(vocabulary, skipped, size, next(model.parameters()).device)
    alone = [_own_nll(model, piece) for piece in texts.pieces]
    joined = _own_nll(model, [token for piece in texts.rows[0] for token in piece])
    moved = float((joined[-len(alone[1]) :] - alone[1]).abs().max())
    limit = max(5e-6, min(TOLERANCE, moved / SIGHT))
    found: dict[str, float] = {}

    def packed(way: Way, rows: list[list[list[int]]]) -> float:
        row_support.attach(model, replace(ALONE, packing=way))
        tensors = [t.to(model.device) for t in row_layouts.packed(rows, texts.rows[0][0][0])]
        return _largest(losses.token_nll(model, *tensors), alone)

    def candidates(way: Way) -> float:
        row_support.attach(model, replace(ALONE, candidates=way))
        tensors, visible = row_layouts.sharing_a_prompt(texts.items, texts.rows[0][0][0])
        nll_N = losses.token_nll(model, *(t.to(model.device) for t in tensors), visible.to(model.device))
        return _largest(nll_N, [_own_nll(model, p + c)[-len(c) :] for p, own in texts.items for c in own])

    found[AHEAD] = packed("none", [[piece] for piece in texts.pieces])
    if not found[AHEAD] <= limit:
        return replace(ALONE, measured=found, why=f"what follows a token moves it by {found[AHEAD]:.2g} nats")
    packing = _first(PACKING, lambda way: packed(way, texts.rows), limit, found, "packing")
    shared = _first(CANDIDATES, candidates, limit, found, "candidates")
    head = _head(model, texts.pieces[0], found)
    return RowSupport(packing, shared, head, found)


def _measured(base: BaseModel, section: BaseModelSection, scratch: Path | None) -> RowSupport:
    """`measure` on a small model of the base; values of caution with the reason where that does not work."""
    event("measuring whether rows can be shared: once for each base model")
    scratch = scratch or base.directory.with_name(f".{base.directory.name}.rows")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        checkpoint = Checkpoint(base.directory)
        settings = layer_sample.text_settings(checkpoint.config)
        positions = [settings[key] for key in ("max_position_embeddings", "n_positions") if settings.get(key)]
        size = 4 if min(positions, default=WINDOW * 4) >= WINDOW * 3 else 1
        layer_sample.write(checkpoint, _layers(checkpoint), scratch)
        _shorten_windows(scratch / "config.json", WINDOW * size // 4)
        sample, which = replace(base, directory=scratch, quantization=PLAIN), {
            "vocabulary": int(settings["vocab_size"]),
            "skipped": _named_tokens(checkpoint.config),
            "size": size,
        }
        is_flash = section.attention.startswith("flash")
        plain = section.model_copy(update={"attention": "sdpa"}) if is_flash else section
        with float32_model.frugal_loading():
            model = loading.load_model(sample, plain, dtype=torch.float32)
        found = measure(float32_model.visiting_every_expert(model), **which)
        if not is_flash:
            return found
        del model
        narrow = loading.load_model(sample, section, dtype=torch.bfloat16)
        return replace(measure_attention(narrow, **which), head=found.head)
    except (ArtefactError, MemoryError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = "memory ran out" if is_out_of_memory(error) else str(error).strip().splitlines()[0][:200]
        return replace(ALONE, why=reason or type(error).__name__)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@torch.no_grad()
def measure_attention(model: Any, *, vocabulary: int, skipped: Sequence[int] = (), size: int = 4) -> RowSupport:
    """As `measure`, for a model in bfloat16: its attention blocks alone, by their hidden states, and no candidates."""
    _silence_all_but_attention(model)
    texts = _texts(vocabulary, skipped, size, model.device)
    decoder = row_support.causal(model).get_decoder()

    def hidden(**how: Any) -> torch.Tensor:
        return decoder(**how).last_hidden_state.float().flatten(0, 1)

    alone_NH = torch.cat([hidden(input_ids=_row(model, piece), use_cache=False) for piece in texts.pieces])
    ids, positions, _ = row_layouts.packed(texts.rows, texts.rows[0][0][0])
    used = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(texts.rows):
        used[number, : sum(map(len, row))] = True
    found: dict[str, float] = {}

    def packed(way: Way) -> float:
        row_support.attach(model, replace(ALONE, packing=way))
        how = row_support.arguments(model, ids.to(model.device), positions.to(model.device))
        together_NH = hidden(**how)[used.flatten().to(model.device)]
        moved = (together_NH - alone_NH).norm(dim=-1).div(alone_NH.norm(dim=-1)).max()
        return float(torch.nan_to_num(moved, nan=UNLIKE, posinf=UNLIKE))

    # the lengths first: flash attention reads them, and reads positions only of a batch of one row
    order: tuple[Way, ...] = ("varlen", "positions")
    return RowSupport(_first(order, packed, BFLOAT16_TOLERANCE, found, "packing"), "none", "model", found)


def _first(
    ways: Sequence[Way], difference: Callable[[Way], float], limit: float, found: dict[str, float], what: str
) -> Any:
    """The first way that moves nothing; what each moved goes into `found`."""
    for way in ways:
        try:
            moved = difference(way)
        except (
            TypeError,
            ValueError,
            RuntimeError,
            KeyError,
            AttributeError,
            IndexError,
            NotImplementedError,
        ) as error:
            if is_out_of_memory(error):
                raise
            continue  # the model has no such argument
        found[f"{what}:{way}"] = moved
        if moved <= limit:
            return way
    return "none"


def _head(model: Any, piece: list[int], found: dict[str, float]) -> Any:
    """Whether hidden states times the output head are the model's own logits."""
    with torch.no_grad():
        own_TV = model(input_ids=_row(model, piece), use_cache=False).logits[0].float()
        try:
            ours_TV = losses.fused_logits(model, _row(model, piece))[0].float()
            difference = (ours_TV - own_TV).abs().max() / own_TV.abs().max()
            found["head"] = float(torch.nan_to_num(difference, nan=UNLIKE, posinf=UNLIKE))
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
            return "model"
    return "fused" if found["head"] <= SAME_LOGITS else "model"


@torch.no_grad()
def _own_nll(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """NLL of each token but the first, by the model's own logits on nothing but these tokens."""
    ids = _row(model, tokens)
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits_TV, ids[0, 1:], reduction="none")


def _row(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=model.device)


def _largest(nll_N: torch.Tensor, alone: Sequence[torch.Tensor]) -> float:
    """The largest difference; NaN is one."""
    difference = (nll_N - torch.cat(list(alone))).abs().max()
    return float(torch.nan_to_num(difference, nan=UNLIKE, posinf=UNLIKE))


def _texts(vocabulary: int, skipped: Sequence[int], size: int, device: torch.device) -> _Texts:
    """Random pieces, the same every time: 12 to 24 times `size` tokens, candidates of a few."""
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor(sorted(set(range(vocabulary)) - set(skipped)))

    def some(count: int) -> list[int]:
        return usable[torch.randint(0, len(usable), (count,), generator=generator)].tolist()

    rows = [[some(18 * size), some(15 * size)], [some(10 * size), some(20 * size)]]
    items = [(some(20 * size), [some(12), some(5), some(9)]), (some(4 * size), [some(3), some(7)])]
    return _Texts(rows, items)


def _layers(checkpoint: Checkpoint) -> list[int]:
    """The first layers until one of each kind is there; only those of a kind's first one where memory is short.

    The first layers and not some: periods and offsets in config.json go on to mean what they mean.
    """
    count, path = layer_sample.layer_count(checkpoint), None
    path = decoder_list(checkpoint.homes, count)
    tensors: dict[int, set[str]] = {}
    for name in checkpoint.homes:
        if (layer := number_in(path, name)) is not None and layer < count:
            tensors.setdefault(layer, set()).add(re.sub(r"\.\d+\.", ".*.", name.removeprefix(f"{path}.{layer}.")))
    kinds = layer_sample.text_settings(checkpoint.config).get("layer_types") or [None] * count
    seen: dict[Any, int] = {}
    for layer in sorted(tensors):
        seen.setdefault((kinds[layer], frozenset(tensors[layer])), layer)
    first = list(range(max(seen.values()) + 1))
    room = float32_model.available()
    for layers in (first, sorted(seen.values())):
        if layer_sample.float32_bytes(checkpoint, layers) <= room:
            return layers
    raise ArtefactError(Problem("too little memory for a layer of each kind in float32", f"{room / 1e9:.1f} GB"))


def _shorten_windows(path: Path, tokens: int) -> None:
    """Every window of the attention gets at most so many tokens."""
    settings = files.read_object(path)
    inner = layer_sample.text_settings(settings)
    for key, value in inner.items():
        is_window = _WINDOWS.search(key) and not _NO_WINDOWS.search(key)
        if is_window and isinstance(value, int) and not isinstance(value, bool) and value > tokens:
            inner[key] = tokens
    files.write_json(path, settings)


def _named_tokens(settings: dict[str, Any]) -> list[int]:
    """Tokens that config.json gives a meaning: of images, of padding."""
    entries = {**settings, **layer_sample.text_settings(settings)}
    named = [value for key, value in entries.items() if key.endswith(("_token_id", "_token_index"))]
    return [token for value in named for token in (value if isinstance(value, list) else [value]) if token is not None]


def _silence_all_but_attention(model: Any) -> None:
    """Feed-forward modules give zeros: what is left are attention blocks and residuals."""
    names = re.compile(r"mlp|feed_forward|ffn|moe|expert", re.IGNORECASE)
    for name, module in row_support.causal(model).get_decoder().named_modules():
        leaf = name.rpartition(".")[2]
        if (
            names.search(leaf)
            and "norm" not in leaf
            and not re.search(r"\.(mlp|feed_forward|ffn|moe)\.", f".{name}"[:-1])
        ):
            module.forward = lambda x, *_, **__: torch.zeros_like(x)


def _said(support: RowSupport, of: str) -> RowSupport:
    """Raises ArtefactError for a model that looks ahead; says, once in a process, what is not shared and why."""
    if not support.measured.get(AHEAD, 0.0) <= TOLERANCE:
        fix = "give a causal language model"
        raise ArtefactError(Problem(f"the base model looks ahead: {support.why}", fix=fix))
    if of in _mentioned:
        return support
    _mentioned.add(of)
    if support.why:
        warning(
            "rows could not be probed: one document and one candidate in each, the model's own head", why=support.why
        )
        return support
    moved = {name: f"{value:.2g}" for name, value in support.measured.items()}
    if not support.packs:
        warning("documents see each other when they share a row of this model: one document in each", nats=moved)
    if support.candidates == "none":
        warning("candidate answers see each other when they share a row of this model: one in each", nats=moved)
    if support.head == "model":
        event("the model changes its logits after the output head: losses come from its own")
    return support
