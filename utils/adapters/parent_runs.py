"""How stages find their parents: pinned, or the newest that fits; our own runs, or adapters that another tool made."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from config import PRESETS, BaseModelSection, Config
from utils import flags
from utils.adapters import adapter_files, adapter_tokenizer, cards, other_tools
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.data import prepared_identity
from utils.exceptions import ArtefactError, Problem
from utils.logger import event, warning
from utils.models import sources
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN

# of another tool; the recorded word
EXTERNAL = "elsewhere"
ASSERTED = "asserted, not verified: this adapter is for this base model"
SAME_BASE = "if it is the same in other files, say --inputs.same_base true"
# stage -> what prepared data counts where it has any of it, and what is said where not
TRAINED_ON = {
    "domain": ("documents", "prepared without documents (--data.corpus)"),
    "task": ("examples", "prepared without labelled pairs (--data.task)"),
}
# adapters trained here are at 0.3 to 4% of the weights (median over modules); lora_alpha times 100 is far above
UNUSUAL_SIZE = 0.25


def prepared_run(config: Config, base: BaseModel, stage: str = "") -> Run:
    """The prepared data to use: pinned, or the newest that fits this tokenizer and what these settings say of data.

    For a training `stage`, it has the documents or the pairs that are trained on. What the settings say is every
    `data` setting that a flag or the environment gave, or that is not the preset's.
    """
    usual = PRESETS[config.preset]().data
    changed = {f"data.{name}" for name, value in config.data if value != getattr(usual, name)}
    settings = sorted(changed | {path for path in config.overrides if path.startswith("data.")})
    identity = prepared_identity.identity(config.data, base, config.run.seed) if settings else None

    def fits(run: Run) -> str:
        if run.manifest["identity"]["tokenizer"] != base.tokenizer_digest:
            return f"prepared with another tokenizer{flags.to_use(run.manifest['base'], base.source, base.revision)}"
        if identity and not identity.is_of(run.manifest["identity"]):
            return f"prepared with other settings than {', '.join('--' + path for path in settings)}"
        if stage and TRAINED_ON[stage][0] not in run.manifest["counts"]:
            return TRAINED_ON[stage][1]
        return ""

    root, hint = config.run.data_dir, flags.given(config, "base", "data")
    if not settings and config.base.source != PRESETS[config.preset]().base.source:  # it would be the demo's data
        hint += " --data.corpus YOUR_DOCUMENTS --data.task YOUR_PAIRS"
    return runs.parent(root, "prepared", config.inputs.prepared, fits, flag="--inputs.prepared", hint=hint)


def domain_run(config: Config, base: BaseModel, *, below: bool = False, quiet: bool = False) -> Run:
    """The domain adapter: pinned (any folder in PEFT's format), or the newest run for this base model.

    `below`: a task adapter is to be trained on it, so that the error of a missing one says how to do without.
    `quiet`: it is only looked up, not used.
    """
    pinned, hint = config.inputs.domain_adapter, flags.given(config, "base")
    if below:
        prepared = runs.complete_runs(config.run.data_dir, "prepared")
        has_documents = any("documents" in run.manifest["counts"] for run in prepared)
        hint += " or train the task adapter without one: --task.on base"
        hint += "" if has_documents or not prepared else " (there are no prepared documents to train one on)"
    if pinned and not (own := own_run(Path(pinned))):
        return external_run(config, base, "domain", Path(pinned))
    return runs.parent(
        config.run.models_dir,
        "domain",
        str(own) if pinned else "",
        for_base(config, base),
        flag="--domain_adapter",
        hint=hint,
        quiet=quiet,
    )


def task_run(config: Config, base: BaseModel, *, quiet: bool = False) -> Run:
    """The task adapter: pinned (any folder in PEFT's format), or the newest run that was trained on `task.on`.

    Where no setting says on what, and there is neither a domain adapter nor one trained on it, on the base.
    """
    pinned, on, right_base = config.inputs.task_adapter, config.task.on, for_base(config, base)
    if not (names_task_on(config) or config.inputs.domain_adapter or is_there(config, base, "domain")):
        on = on if is_there(config, base, "task", on=on) else "base"
    if pinned and not (own := own_run(Path(pinned))):
        return external_run(config, base, "task", Path(pinned))

    def fits(run: Run) -> str:
        trained_on = run.manifest["identity"]["on"]
        if reason := right_base(run):
            return reason
        return "" if trained_on == on else f"trained on {trained_on}, not on {on} (say --task.on {trained_on})"

    return runs.parent(
        config.run.models_dir,
        "task",
        str(own) if pinned else "",
        right_base if pinned else fits,
        flag="--task_adapter",
        hint=flags.given(config, "base") + ("" if on == "domain" else f" --task.on {on}"),
        quiet=quiet,
    )


def names_task_on(config: Config) -> bool:
    """Whether a setting, and not the preset, says what the task adapter was trained on."""
    return "task.on" in config.overrides or config.task.on != PRESETS[config.preset]().task.on


def is_there(config: Config, base: BaseModel, stage: str, *, on: str = "", after: int = -1) -> bool:
    """Whether a complete run of this stage fits the base model; only one trained `on` that, made `after` that (ns)."""
    fits, listed = for_base(config, base), runs.complete_runs(config.run.models_dir, stage)
    later = [run for run in listed if run.manifest.get("created_ns", 0) > after]
    return any(not fits(run) for run in later if on in ("", run.manifest["identity"].get("on")))


def initial_run(config: Config, base: BaseModel, stage: str) -> Run | None:
    """The adapter that a training starts from (`domain.init_from`, `task.init_from`); None for a fresh one."""
    path = getattr(config, stage).init_from
    if not path:
        return None
    run = any_run(config, base, Path(path), flag=f"--{stage}.init_from")
    event(f"the {stage} adapter starts from another; optimiser and learning rate start anew", path=run.directory)
    return run


def further_runs(config: Config, base: BaseModel) -> list[Run]:
    """The adapters of `compose.also`."""
    return [any_run(config, base, Path(path), flag="--compose.also") for path in config.compose.also]


def any_run(config: Config, base: BaseModel, path: Path, *, flag: str) -> Run:
    """An adapter of ours or of another tool at a path. Raises ArtefactError when it belongs to another base model."""
    own = own_run(path)
    run = Run(own, files.verify(own)) if own else external_run(config, base, "further", path)
    if reason := for_base(config, base)(run):
        raise ArtefactError(Problem(f"{flag} cannot be used: {reason}", str(path)))
    return run


def external_run(config: Config, base: BaseModel, stage: str, path: Path) -> Run:
    """An adapter that another tool made, as a run: identified by its files' digests, checked against the base model."""
    directory = adapter_files.find(path)
    if (directory.parent / "identity.json").exists() and not (directory.parent / files.MANIFEST).exists():
        raise ArtefactError(
            Problem(f"{directory.parent} is an unfinished run", fix="run the same training command again")
        )
    settings = other_tools.read(directory)
    named, revision = settings.get("base_model_name_or_path") or "", settings.get("revision") or ""
    made_for = f"{named} {revision}".strip()
    way = flags.to_use({"source": named, "revision": revision}, base.source, base.revision)
    fix = f"this one is {base.source} {base.revision}".rstrip() + f"{way}; {SAME_BASE}"
    problem = Problem(f"{directory} was made for another base model", made_for, fix)
    if is_model(named):
        is_this = Path(named).resolve() == base.directory.resolve()
        as_ours = BaseModelSection(source=str(named), quantization=PLAIN if is_this else base.quantization)
        is_other = sources.fetch(as_ours, config.run.models_dir).digest not in (base.digest, base.made_from)
    else:
        at_this = named == base.source and revision in ("", "main", base.revision)
        is_other = bool(named and base.revision) and not at_this
    if is_other and not config.inputs.same_base:
        raise ArtefactError(problem)
    if is_other:
        event(ASSERTED, adapter=directory, made_for=made_for)
    elif not is_model(named):
        warning(
            "the base model of this adapter cannot be verified, only that its shapes fit",
            adapter=directory,
            made_for=named or "not said",
        )
    size = adapter_files.relative_size(adapter_files.load(directory, base), base)
    if size > UNUSUAL_SIZE:
        warning(
            "the update of this adapter is unusually large beside the weights: is its lora_alpha the one it had?",
            adapter=directory,
            share=size,
            lora_alpha=settings["lora_alpha"],
        )
    event(f"using an adapter of another tool as the {stage} adapter", path=directory, peft=settings.get("peft_version"))
    return Run(
        directory,
        {
            "kind": stage,
            "digest": adapter_files.digest(directory),
            "files": adapter_files.digests(directory),
            "base": base.record(),
            "parents": [],
            "identity": {"stage": stage, "on": EXTERNAL},
            "system_prompt": config.task.system_prompt,
            "adapter": ".",
            **adapter_tokenizer.choose(directory, base, config.inputs),
            **({cards.ASSERTED: made_for} if is_other else {}),
        },
    )


def adapter_runs(config: Config, base: BaseModel, which: str = "both") -> list[Run]:
    """The adapters that are put together, domain before task, then the further ones; `which` as in inference.

    One of the two where only that one was made or named. Raises ArtefactError when none is there, and when one belongs
    to another base or domain adapter, or is given twice.
    """
    if which == "domain":
        return [domain_run(config, base)]
    domain, task = pair(config, base, quiet=which == "task")
    if which == "task":
        return [task or task_run(config, base)]  # which says what is missing
    adapters = [*filter(None, (domain, task)), *further_runs(config, base)]
    if len(adapters) == 1:
        say_alone(config, adapters[0])
    for i, run in enumerate(adapters):
        if any(run.digest == other.digest for other in adapters[:i]):
            fix = "give it once, with a larger --weights"
            raise ArtefactError(Problem("the same adapter is given twice", str(run.directory), fix))
    return adapters


def parent_of(run: Run, kind: str, root: Path) -> Run | None:
    """The parent of that kind, found by digest, so a moved or renamed directory is found too; None when it has none."""
    if not any(p["kind"] == kind for p in run.manifest["parents"]):
        return None
    return parent_by_digest(run, kind, (root,))


def parent_by_digest(run: Run, kind: str, roots: Sequence[Path]) -> Run:
    """The parent of that kind under one of the roots. Raises ArtefactError when there is none."""
    entry = next((p for p in run.manifest["parents"] if p["kind"] == kind), None)
    if entry is None:
        raise ArtefactError(Problem(f"{run.directory} names no {kind} run that it was made from"))
    parent = next((r for root in roots for r in runs.complete_runs(root, kind) if r.digest == entry["digest"]), None)
    if parent is None:
        where = " or ".join(str(root) for root in roots)
        what = f"{run.directory} was made from the {kind} run {entry['path']}, which is not under {where}"
        raise ArtefactError(Problem(what, entry["digest"]))
    files.verify(parent.directory)
    return parent


def data_of(config: Config, base: BaseModel, adapters: Sequence[Run]) -> Run | None:
    """The prepared data these adapters were trained on; for adapters of other tools the newest that fits, if any."""
    for run in reversed(adapters):
        if (data := parent_of(run, "prepared", config.run.data_dir)) is not None:
            return data
    with suppress(ArtefactError):
        return prepared_run(config, base)
    return None


def pair(config: Config, base: BaseModel, *, quiet: bool = False) -> tuple[Run | None, Run | None]:
    """(domain run, task run) that belong together: a stacked task adapter fixes its domain adapter by digest.

    One of them is None where only the other was made, or named. Raises ArtefactError when there is neither.
    """
    inputs = config.inputs
    if not inputs.task_adapter and not names_task_on(config) and not is_there(config, base, "task"):
        if inputs.domain_adapter or is_there(config, base, "domain"):
            return domain_run(config, base, quiet=quiet), None
        for stage, newest in (("task", task_run), ("domain", domain_run)):
            if runs.complete_runs(config.run.models_dir, stage):
                newest(config, base)  # it says why none of them fits
        raise ArtefactError(nothing_there(config))
    task = task_run(config, base, quiet=quiet)
    stacked_on = next((p["digest"] for p in task.manifest["parents"] if p["kind"] == "domain"), None)
    if config.inputs.domain_adapter:  # a path that was given and is wrong must not pass for none
        domain = domain_run(config, base, quiet=quiet)
        if stacked_on and domain.digest != stacked_on:
            what = f"{task.directory} was trained on another domain adapter than the one asked for"
            fix = f"leave out --domain_adapter, or train the task adapter on it: {runs.STAGES['task']} "
            fix += f"--domain_adapter {shlex.quote(str(domain.directory))}{flags.given(config, 'base')}"
            raise ArtefactError(Problem(what, str(domain.directory), fix))
        return domain, task
    if stacked_on:
        below = parent_of(task, "domain", config.run.models_dir)
        if below and not quiet and is_there(config, base, "domain", after=below.manifest.get("created_ns", 0)):
            event("the domain adapter is the one below the task adapter, not the newest", taken=below.directory)
        return below, task
    with suppress(ArtefactError):
        return domain_run(config, base, quiet=quiet), task
    return None, task


def say_alone(config: Config, run: Run) -> None:
    """One line where only one half is in use: which, and the command that makes the other."""
    kind = run.manifest["kind"]
    other = {"domain": "task", "task": "domain"}.get(kind)
    if other and run.manifest["identity"].get("on") != EXTERNAL:
        train = runs.STAGES[other] + flags.given(config, "base")
        event(f"the {kind} adapter is used alone: there is no {other} adapter", to_train_one=train)


def is_model(named: str) -> bool:
    """Whether an adapter's base model is a directory here; what it says may be any text."""
    with suppress(OSError, ValueError):
        return bool(named) and (Path(named) / "config.json").is_file()
    return False


def own_run(path: Path) -> Path | None:
    """The directory of a complete run of ours at `path`, which may also name its adapter/ folder."""
    for directory in (path, path.parent if path.name == "adapter" else path):
        if (directory / files.MANIFEST).exists():
            return directory
    return None


def for_base(config: Config, base: BaseModel) -> Callable[[Run], str]:
    """A function of a run: the reason why it cannot be used with this base model, or an empty string."""

    def fits(run: Run) -> str:
        record = run.manifest["base"]
        trained_on = record.get("quantization", PLAIN)
        if record["digest"] != base.digest and trained_on != base.quantization:
            says = {PLAIN: "the base model as it is"}
            ours, theirs = (says.get(kind, f"the base model in {kind}") for kind in (base.quantization, trained_on))
            return f"trained on {theirs}, this is {ours} (say --base.quantization {trained_on})"
        if base.made_from and record["digest"] == base.made_from:
            event("the base model has modules of another adapter than this one was made for", adapter=run.directory)
        elif record["digest"] != base.digest and config.inputs.same_base:
            event(ASSERTED, adapter=run.directory, made_for=f"{record['source']}, digest {record['digest'][:12]}")
        elif record["digest"] != base.digest:
            other, ours = record["digest"][:12], base.digest[:12]
            which = f"made for another base model (digest {other}; this one is {ours})"
            return f"{which}{flags.to_use(record, base.source, base.revision)}; {SAME_BASE}"
        if record.get("tokenizer_digest", base.tokenizer_digest) != base.tokenizer_digest:
            return f"made with another tokenizer or chat template than that of {base.directory}"
        return ""

    return fits


def nothing_there(config: Config) -> list[Problem]:
    """What is said where there is neither adapter: how to train each of them."""
    where, hint = config.run.models_dir, flags.given(config, "base")
    commands = {"domain": f"{runs.STAGES['domain']}{hint}", "task": f"{runs.STAGES['task']}{hint} --task.on base"}
    return [
        Problem(f"no complete domain or task run that fits under {where}"),
        *(Problem(f"a {stage} adapter, which can be used alone", fix=command) for stage, command in commands.items()),
    ]
