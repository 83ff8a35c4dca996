"""Results of the suites as a table for a terminal and as a page of plots: nothing is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from utils.artifacts import files
from utils.html import pages
from utils.html.charts import Bar, Series, bars, chart
from utils.html.numbers import general

STYLES = {
    "base": "other",
    "two active": "task",
    "composed": "composed",
    "merged": "domain",
    "ours": "composed",
    "trl": "task",
    "plain": "other",
    "cp": "other",
    "self-check": "domain",
    "peft": "task",
    "lm_eval": "task",
}


def table(results: dict[str, Any]) -> str:
    """Every suite that was run, for a terminal."""
    parts = {
        "inference": _inference_table,
        "training": _training_table,
        "data": _data_table,
        "merge": _merge_table,
        "evaluation": _evaluation_table,
        "gpu": _gpu_table,
    }
    lines = [_machine_line(results["machine"])]
    for suite, make in parts.items():
        if suite in results:
            lines += ["", *make(results[suite])]
    return "\n".join(lines)


def headline(results: dict[str, Any]) -> dict[str, Any]:
    """The few numbers for the last line of stdout."""
    summary: dict[str, Any] = {}
    if "inference" in results:
        cells = results["inference"]["cells"]
        for model in ("two active", "composed", "merged"):
            ratios = [cell["models"][model]["decode_to_base"] for cell in cells]
            summary[f"{model.replace(' ', '_')}_decode_to_base"] = {"smallest": min(ratios), "largest": max(ratios)}
    if "training" in results:
        contenders = results["training"]["contenders"]
        summary["training_tokens_per_second"] = {name: c["tokens_per_second"] for name, c in contenders.items()}
    if "data" in results:
        keys = ("time_exponent", "anonymous_bytes_per_byte")
        summary["data"] = {key: results["data"][key] for key in keys if key in results["data"]}
    if "merge" in results:
        summary["merge_to_cp"] = {name: c["to_cp"] for name, c in results["merge"]["contenders"].items()}
    if "evaluation" in results:
        parts = results["evaluation"]["parts"].items()
        summary["evaluation_per_second"] = {
            name: {contender: c["per_second"] for contender, c in part["contenders"].items()} for name, part in parts
        }
    if "gpu" in results:
        runs = {name: run for name, run in results["gpu"]["minimax_m2"].items() if "skipped" not in run}
        summary["gpu_tokens_per_second"] = {name: run["tokens_per_second"] for name, run in runs.items()}
        summary["gpu_62_layers_tokens_per_second"] = results["gpu"]["extrapolation"]["tokens_per_second"]
    return summary


def write_plots(results: dict[str, Any], path: Path) -> None:
    """A page with the plots of every suite that was run; none, and no page, of a suite that has none."""
    makers = {
        "inference": _inference_plots,
        "training": _training_plots,
        "data": _data_plots,
        "merge": _merge_plots,
        "evaluation": _evaluation_plots,
    }
    drawn = [
        Markup('<h2>{}</h2><div class="charts">{}</div>').format(
            suite.capitalize(), Markup("").join(make(results[suite]))
        )
        for suite, make in makers.items()
        if suite in results
    ]
    if drawn:
        body = Markup('<h1>Benchmark</h1><p>{}.</p>{}<p class="note">summary.txt has the tables, results.json all.</p>')
        plots = Markup("").join(drawn)
        files.write_text(path, pages.shell("Benchmark", body.format(_machine_line(results["machine"]), plots)))


def _machine_line(machine: dict[str, Any]) -> str:
    before, after = machine["load_before"], machine["load_after"]
    return f"{machine['device']}, {machine['threads']} threads, load average {before} before, {after} after"


def _inference_table(results: dict[str, Any]) -> list[str]:
    lines = [
        f"inference in {results['dtype']}, rank {results['rank']}; x is the median of ratios to base within a repeat",
        f"{'prompt':>7}{'batch':>6}  {'model':<11}{'first token ms (p95)':>22}{'x':>6}"
        f"{'ms per token (p95)':>22}{'x':>6}{'tokens/s':>10}{'peak MB':>9}",
    ]
    for cell in results["cells"]:
        for model, n in cell["models"].items():
            prefill, decode = n["prefill_ms"], n["decode_ms_per_token"]
            lines.append(
                f"{cell['prompt_tokens']:>7}{cell['batch_size']:>6}  {model:<11}"
                f"{prefill['p50']:>13.1f} {_in_brackets(prefill['p95'])}{n['prefill_to_base']:>6.2f}"
                f"{decode['p50']:>13.2f} {_in_brackets(decode['p95'])}{n['decode_to_base']:>6.2f}"
                f"{n['tokens_per_second']:>10.1f}{n['peak_memory_bytes'] / 1e6:>9.0f}"
            )
    has_amx = results.get("vector_products", False)
    if any(cell["batch_size"] == 1 for cell in results["cells"]) and has_amx:
        lines.append(
            "on a CPU at batch 1 composed uses matrix-vector products; base and merged do not, and would gain by them"
        )
    if not results["merged_measured_in_same_repeats"]:
        lines.append("merged was measured after the others (one copy of the weights), so its ratios are not paired")
    return lines


def _in_brackets(number: float) -> str:
    return f"{f'({number:.1f})':>8}"


def _training_table(results: dict[str, Any]) -> list[str]:
    lines = [
        f"training in {results['dtype']}, {results['tokens_per_step']} tokens a step, rows of {results['row_tokens']}, "
        f"{results['counted_steps']} counted steps; {results['trl']}",
        f"  peak of a matrix product {results['matmul_peak_flops'] / 1e9:.0f} GFLOP/s, "
        f"{results['flops_per_token'] / 1e6:.0f} MFLOP per token",
        f"  {'loop':<8}{'tokens/s':>10}{'s per step':>12}{'time to ours':>14}{'of peak':>9}",
    ]
    for name, n in results["contenders"].items():
        lines.append(
            f"  {name:<8}{n['tokens_per_second']:>10.1f}{n['seconds_per_step']:>12.3f}"
            f"{n['time_to_ours']:>14.2f}{n['share_of_peak']:>9.1%}"
        )
    return lines


def _data_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "preparing data",
        f"{'MB':>7}{'documents':>11}{'seconds':>10}{'s per GB':>10}{'peak MB':>9}{'anonymous MB':>14}",
    ]
    for n in results["preparations"]:
        lines.append(
            f"{n['corpus_bytes'] / 1e6:>7.0f}{n['documents']:>11,}{n['seconds']:>10.1f}{n['seconds_per_gb']:>10.0f}"
            f"{n['peak_memory_bytes'] / 1e6:>9.0f}{n['peak_anonymous_bytes'] / 1e6:>14.0f}"
        )
    if "time_exponent" in results:
        lines.append(
            f"  time grows with size to the power {results['time_exponent']}; each further byte of text takes "
            f"{results['anonymous_bytes_per_byte']} bytes of memory that is not a file's"
        )
    return lines


def _merge_table(results: dict[str, Any]) -> list[str]:
    n = results["checkpoint"]
    on = "attention and experts" if results["with_experts"] else "attention"
    lines = [
        f"merging an adapter on the {on} of a synthetic MiniMax-M2 of {n['bytes'] / 1e9:.1f} GB: {n['layers']} layers, "
        f"hidden {n['hidden']}, {n['experts']} experts; {n['files']} files of up to "
        f"{n['largest_file_bytes'] / 1e6:.0f} MB; page cache as it was",
        f"  {'step':<12}{'seconds':>16}{'to cp':>8}{'CPU seconds':>16}{'peak MB':>10}{'anonymous MB':>14}",
    ]
    for name, c in results["contenders"].items():
        lines.append(
            f"  {name:<12}{' '.join(f'{s:.1f}' for s in c['seconds']):>16}{c['to_cp']:>8.2f}"
            f"{' '.join(f'{s:.1f}' for s in c['cpu_seconds']):>16}"
            f"{c['peak_memory_bytes'] / 1e6:>10.0f}{c['peak_anonymous_bytes'] / 1e6:>14.0f}"
        )
    facts = results["contenders"]["self-check"]["facts"]
    lines.append(
        f"  cp until on the disk: {results['contenders']['cp']['facts']['seconds_until_on_disk']} s; ours includes "
        f"that, and the sha256 of every file; the self-check loaded {len(facts['checked_layers'])} of {n['layers']} "
        "layers"
    )
    return lines


def _evaluation_table(results: dict[str, Any]) -> list[str]:
    lines = [
        f"scoring in {results['dtype']}, up to {results['batch_tokens']} padded tokens a forward pass; "
        f"{results['lm_eval']}",
        f"  {'what':<11}{'counted':>9} {'unit':<8}{'scorer':<9}{'per second':>11}{'time to ours':>14}"
        f"{'median of slices':>18}{'largest difference':>20}",
    ]
    for name, part in results["parts"].items():
        for contender, n in part["contenders"].items():
            line = f"  {name:<11}{part['counted']:>9,} {part['unit']:<8}{contender:<9}{n['per_second']:>11,.2f}"
            if "time_to_ours" in n:
                line += f"{n['time_to_ours']:>14.2f}{n['median_time_to_ours']:>18.2f}"
                line += f"{n['largest_relative_difference']:>20.1e}"
            lines.append(line)
    return lines


def _gpu_table(results: dict[str, Any]) -> list[str]:
    lines = [f"MiniMax-M2's layers on one GPU{', at toy size: these numbers mean nothing' if results['toy'] else ''}"]
    lines.append(f"  {'base, adapter':<14}{'layers':>7}{'tokens/s':>10}{'MFU':>7}{'peak GiB':>10}{'predicted GiB':>16}")
    for name, n in results["minimax_m2"].items():
        if "skipped" in n:
            lines.append(f"  {name:<14} not measured: {n['skipped']}")
            continue
        predicted = " to ".join(f"{size / 2**30:.1f}" for size in n["predicted_bytes"])
        lines.append(
            f"  {name:<14}{n['layers']:>7}{n['tokens_per_second']:>10,.1f}{n['model_utilisation']:>7.1%}"
            f"{n['peak_memory_bytes'] / 2**30:>10.1f}{predicted:>16}"
        )
    n, merge = results["extrapolation"], results["merge"]
    rates, memory = n["tokens_per_second"], " to ".join(map(str, n["predicted_gib_per_gpu"]))
    lines += [
        f"  extrapolated to {n['layers']} layers on {n['gpus']} GPUs: {rates['hidden']:,.0f} tokens/s if gathering "
        f"weights is hidden, {rates['not_hidden']:,.0f} if not; {memory} GiB each predicted",
        "  assumed: a layer runs as fast there, embeddings and head as efficiently, weights gathered twice over NVLink",
        f"  float32 parity, parts active to composed: MiniMax-M2 {_parity(results['parity_minimax_m2'])}, dense "
        f"{_parity(results['parity_dense'])}; merged and reloaded {merge['max_logit_difference']:.1e} of a largest "
        f"logit {merge['largest_logit']:.3g}, in {merge['seconds']} s",
        *("", "the dense model:", *_training_table(results["training"]), "", *_inference_table(results["inference"])),
    ]
    steps = {name: c["step_memory_bytes"] for name, c in results["training"]["contenders"].items()}
    if any(steps.values()):
        lines.append(
            "  memory of a step: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in steps.items())
        )
    return lines


def _parity(differences: dict[str, float]) -> str:
    return f"{differences['parts_active_to_composed']:.1e}"


def _inference_plots(results: dict[str, Any]) -> list[Markup]:
    models = [name for name in results["cells"][0]["models"] if name != "base"]
    plots = []
    for key, title in (("prefill_to_base", "Time to first token"), ("decode_to_base", "Time per further token")):
        groups = {}
        for cell in results["cells"]:
            ratios = {model: cell["models"][model][key] for model in models}
            group = [Bar(model, STYLES[model], ratio, f"{ratio:.2f}") for model, ratio in ratios.items()]
            groups[f"{cell['prompt_tokens']} tokens, batch {cell['batch_size']}"] = group
        plots.append(bars(title, groups, x="times the base model", reference=(1.0, "the base model")))
    return plots


def _training_plots(results: dict[str, Any]) -> list[Markup]:
    measured = [
        Bar(
            name,
            STYLES[name],
            n["tokens_per_second"],
            f"{general(n['tokens_per_second'])}, {n['share_of_peak']:.0%} of the machine's peak",
        )
        for name, n in results["contenders"].items()
    ]
    return [bars("Speed of training", {"": measured}, x="trained tokens per second")]


def _data_plots(results: dict[str, Any]) -> list[Markup]:
    measured = results["preparations"]
    sizes = [n["corpus_bytes"] / 1e6 for n in measured]
    time = Series(
        "time", "composed", list(zip(sizes, (n["seconds"] for n in measured), strict=True)), mark="dot", key=""
    )
    memory = [
        Series(name, style, [(size, n[key] / 1e6) for size, n in zip(sizes, measured, strict=True)], mark="dot")
        for key, name, style in (
            ("peak_memory_bytes", "with mapped files", "other"),
            ("peak_anonymous_bytes", "without mapped files", "composed"),
        )
    ]
    return [
        chart("Time to prepare data", [time], x="MB of jsonl", y="seconds", zero=True),
        chart("Memory to prepare data", memory, x="MB of jsonl", y="peak resident MB", zero=True),
    ]


def _merge_plots(results: dict[str, Any]) -> list[Markup]:
    times, memory = [], []
    for name, n in results["contenders"].items():
        seconds = sum(n["seconds"]) / len(n["seconds"])
        times.append(Bar(name, STYLES[name], seconds, f"{seconds:.1f} s, {n['to_cp']:.1f} x cp"))
        memory.append(Bar(name, STYLES[name], n["peak_anonymous_bytes"] / 1e6))
    largest = (results["checkpoint"]["largest_file_bytes"] / 1e6, "the largest file")
    return [
        bars("Time of a merge", {"": times}, x="seconds"),
        bars("Memory of a merge, without mapped files", {"": memory}, x="peak MB", reference=largest),
    ]


def _evaluation_plots(results: dict[str, Any]) -> list[Markup]:
    plots = []
    for name, part in results["parts"].items():
        measured = []
        for contender, n in part["contenders"].items():
            against = f", {n['time_to_ours']:.1f} x our time" if "time_to_ours" in n else ""
            measured.append(Bar(contender, STYLES[contender], n["per_second"], f"{general(n['per_second'])}{against}"))
        plots.append(bars(f"Speed of scoring: {name}", {"": measured}, x=f"{part['unit']} per second"))
    return plots
