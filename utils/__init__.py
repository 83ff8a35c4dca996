"""The library behind the scripts: a package for each subject. This table is the only place that says their order.

Imports go strictly down from row to row; packages of one row do not import each other, and inside a package imports
form no circle. `tests/test_architecture.py` reads this table and holds every module to it.
"""

# modules that lie in utils/ itself: how a script talks, stops and fails
PLUMBING = ("exceptions", "secrets", "disk", "logger", "signals", "progress", "flags")

# upwards, from what everything may use
ROWS: tuple[dict[str, str], ...] = (
    {
        "artifacts": "what is on disk: files that are whole or not there, locks, manifests, run directories",
        "html": "self-contained HTML pages: charts, numbers, style",
    },
    {"models": "a base model: where it comes from, how it is loaded, its weights on disk, sharding, the loss"},
    {"data": "documents and labelled pairs in; prepared data, batches and contamination out; built-in domains"},
    {"adapters": "LoRA as factors, as PEFT's files and as layers on a model; how adapters and runs are found"},
    {"planning": "what fits where and how long it takes, before a weight is read; refusals"},
    {"inference": "what a model answers, here or from a server, and the likelihoods it gives"},
    {
        "training": "the loop over one adapter: checkpoints, guards, the run around it",
        "composition": "several adapters as one: methods, checks, weights chosen on dev, interference",
    },
    {"evaluation": "the proof: rows, controls, intervals, verdict, report; tasks for lm-evaluation-harness"},
    {"export": "the merged model, other formats, hubs, and whether an artefact can be trusted"},
    {
        "rollout": "the canary: policy, gate and controller as values; edge/ has balancer, traffic, servers, service",
        "benchmarks": "speed and memory as ratios measured in one run, a module for each suite",
    },
    {"cli": "the command line of every script: settings, help, exit codes; it answers without torch"},
)

# values in, values out: no model library, no disk, no clock; they import exceptions and each other
PURE = (
    *(
        "models.model_shapes",
        "models.process_layout",
        "models.architectures.architecture",
        "models.architectures.registry",
    ),
    *("models.architectures.minimax_m2", "models.architectures.qwen3_moe"),
    *("data.splits", "data.answer_metrics", "data.ngram_overlap", "data.domains.built_in", "data.domains.invented"),
    *("data.labelled.row_text", "data.labelled.column_roles", "data.labelled.marks", "data.labelled.choices"),
    *("data.labelled.conversation_formats", "data.labelled.values", "data.labelled.groups", "data.labelled.headings"),
    "data.early_warnings",
    "data.labelled.nested",
    *(
        "adapters.factors",
        "planning.expert_imbalance",
        "planning.estimates",
        "planning.hardware",
        "planning.pass_times",
    ),
    *("planning.memory.activations", "planning.memory.native_fp8"),
    *("composition.methods", "composition.approximate_methods", "composition.truncation", "composition.checks"),
    *("composition.weights.points", "composition.weights.compass", "composition.weights.surface"),
    "composition.weights.dev_parts",
    *("composition.weights.modelled_search", "composition.search", "composition.collisions"),
    *("evaluation.intervals", "evaluation.verdict"),
    *("evaluation.one_adapter", "evaluation.learning_curve.power_law", "evaluation.learning_curve.curve_sizes"),
    *("rollout.e_process", "rollout.policy", "rollout.gate", "rollout.controller", "rollout.simulation"),
)

# the modules that scripts call with their whole `Config`; every other one takes the sections that it needs
TAKES_CONFIG = (
    "models.parallel.lifecycle",
    *(
        "models.architectures.size_class",
        "adapters.parent_runs",
        "adapters.unmeant_base",
        "planning.base_checks",
        "planning.preflight",
        "planning.plan_report",
        "planning.stage_commands",
        "planning.dry_run",
    ),
    *(
        "planning.planned_data",
        "planning.training_plan",
        "planning.fitting_settings",
        "planning.smallest_hardware",
        "planning.stage_costs",
    ),
    *(
        "training.domain_adapter",
        "training.going_on",
        "training.task_adapter",
        "training.keeping.keeping_data",
        "training.training_run",
        "training.training_identity",
        "composition.chosen_adapters",
        "composition.composed_adapter",
        "composition.composed_run",
        "composition.dev_losses",
    ),
    *("evaluation.evaluation_identity", "benchmarks.benchmark_identity"),
    *("evaluation.comparison", "evaluation.run_groups", "evaluation.controls", "evaluation.scored_rows"),
    *("evaluation.served_rows", "evaluation.retrieved_rows", "evaluation.baseline_weight"),
    *("evaluation.learning_curve.curve_runs", "evaluation.learning_curve.curve"),
    *("evaluation.matrix.matrix_runs", "evaluation.matrix.matrix_scores", "evaluation.matrix.matrix"),
    *("benchmarks.inputs", "benchmarks.suite_inference", "benchmarks.suite_training", "benchmarks.suite_data"),
    *("benchmarks.suite_merge", "benchmarks.suite_evaluation", "benchmarks.suite_gpu", "benchmarks.suites"),
    "export.model_support",
    "cli.script",
)
