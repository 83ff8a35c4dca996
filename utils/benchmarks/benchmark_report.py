"""Results of the suites as a table for people and as plots: pure text and matplotlib, nothing is measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "base": "#7f7f7f",
    "two active": "#d62728",
    "composed": "#1f77b4",
    "merged": "#2ca02c",
    "ours": "#1f77b4",
    "trl": "#d62728",
    "plain": "#7f7f7f",
    "cp": "#7f7f7f",
    "self-check": "#2ca02c",
    "peft": "#d62728",
    "lm_eval": "#d62728",
}
SIZE_INCHES, DOTS_PER_INCH = (8, 4.5), 120


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
    found: dict[str, Any] = {}
    if "inference" in results:
        cells = results["inference"]["cells"]
        for model in ("two active", "composed", "merged"):
            ratios = [cell["models"][model]["decode_to_base"] for cell in cells]
            found[f"{model.replace(' ', '_')}_decode_to_base"] = {"smallest": min(ratios), "largest": max(ratios)}
    if "training" in results:
        contenders = results["training"]["contenders"]
        found["training_tokens_per_second"] = {name: c["tokens_per_second"] for name, c in contenders.items()}
    if "data" in results:
        keys = ("time_exponent", "anonymous_bytes_per_byte")
        found["data"] = {key: results["data"][key] for key in keys if key in results["data"]}
    if "merge" in results:
        found["merge_to_cp"] = {name: c["to_cp"] for name, c in results["merge"]["contenders"].items()}
    if "evaluation" in results:
        parts = results["evaluation"]["parts"].items()
        found["evaluation_per_second"] = {
            name: {contender: c["per_second"] for contender, c in part["contenders"].items()} for name, part in parts
        }
    if "gpu" in results:
        runs = {name: run for name, run in results["gpu"]["minimax_m2"].items() if "skipped" not in run}
        found["gpu_tokens_per_second"] = {name: run["tokens_per_second"] for name, run in runs.items()}
        found["gpu_62_layers_tokens_per_second"] = results["gpu"]["extrapolation"]["tokens_per_second"]
    return found


def plot(results: dict[str, Any], directory: Path) -> list[Path]:
    """One PNG per suite that was run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    makers = {
        "inference": _plot_inference,
        "training": _plot_training,
        "data": _plot_data,
        "merge": _plot_merge,
        "evaluation": _plot_evaluation,
    }
    written = []
    for suite, draw in makers.items():
        if suite not in results:
            continue
        # not pyplot: no display, no global state
        figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, results[suite])
        written.append(directory / f"{suite}.png")
        figure.savefig(written[-1])
    return written


def _machine_line(machine: dict[str, Any]) -> str:
    before, after = machine["load_before"], machine["load_after"]
    return f"{machine['device']}, {machine['threads']} threads, load average {before} before, {after} after"


def _inference_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"inference in {found['dtype']}, rank {found['rank']}; x is the median of ratios to base within a repeat",
        f"{'prompt':>7}{'batch':>6}  {'model':<11}{'first token ms (p95)':>22}{'x':>6}"
        f"{'ms per token (p95)':>22}{'x':>6}{'tokens/s':>10}{'peak MB':>9}",
    ]
    for cell in found["cells"]:
        for model, n in cell["models"].items():
            prefill, decode = n["prefill_ms"], n["decode_ms_per_token"]
            lines.append(
                f"{cell['prompt_tokens']:>7}{cell['batch_size']:>6}  {model:<11}"
                f"{prefill['p50']:>13.1f} {_in_brackets(prefill['p95'])}{n['prefill_to_base']:>6.2f}"
                f"{decode['p50']:>13.2f} {_in_brackets(decode['p95'])}{n['decode_to_base']:>6.2f}"
                f"{n['tokens_per_second']:>10.1f}{n['peak_memory_bytes'] / 1e6:>9.0f}"
            )
    has_amx = found.get("vector_products", False)
    if any(cell["batch_size"] == 1 for cell in found["cells"]) and has_amx:
        lines.append(
            "on a CPU at batch 1 composed uses matrix-vector products; base and merged do not, and would gain by them"
        )
    if not found["merged_measured_in_same_repeats"]:
        lines.append("merged was measured after the others (one copy of the weights), so its ratios are not paired")
    return lines


def _in_brackets(number: float) -> str:
    return f"{f'({number:.1f})':>8}"


def _training_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"training in {found['dtype']}, {found['tokens_per_step']} tokens a step, rows of {found['row_tokens']}, "
        f"{found['counted_steps']} counted steps; {found['trl']}",
        f"  peak of a matrix product {found['matmul_peak_flops'] / 1e9:.0f} GFLOP/s, "
        f"{found['flops_per_token'] / 1e6:.0f} MFLOP per token",
        f"  {'loop':<8}{'tokens/s':>10}{'s per step':>12}{'time to ours':>14}{'of peak':>9}",
    ]
    for name, n in found["contenders"].items():
        lines.append(
            f"  {name:<8}{n['tokens_per_second']:>10.1f}{n['seconds_per_step']:>12.3f}"
            f"{n['time_to_ours']:>14.2f}{n['share_of_peak']:>9.1%}"
        )
    return lines


def _data_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "preparing data",
        f"{'MB':>7}{'documents':>11}{'seconds':>10}{'s per GB':>10}{'peak MB':>9}{'anonymous MB':>14}",
    ]
    for n in found["preparations"]:
        lines.append(
            f"{n['corpus_bytes'] / 1e6:>7.0f}{n['documents']:>11,}{n['seconds']:>10.1f}{n['seconds_per_gb']:>10.0f}"
            f"{n['peak_memory_bytes'] / 1e6:>9.0f}{n['peak_anonymous_bytes'] / 1e6:>14.0f}"
        )
    if "time_exponent" in found:
        lines.append(
            f"  time grows with size to the power {found['time_exponent']}; each further byte of text takes "
            f"{found['anonymous_bytes_per_byte']} bytes of memory that is not a file's"
        )
    return lines


def _merge_table(found: dict[str, Any]) -> list[str]:
    n = found["checkpoint"]
    on = "attention and experts" if found["with_experts"] else "attention"
    lines = [
        f"merging an adapter on the {on} of a synthetic MiniMax-M2 of {n['bytes'] / 1e9:.1f} GB: {n['layers']} layers, "
        f"hidden {n['hidden']}, {n['experts']} experts; {n['files']} files of up to "
        f"{n['largest_file_bytes'] / 1e6:.0f} MB; page cache as it was",
        f"  {'step':<12}{'seconds':>16}{'to cp':>8}{'CPU seconds':>16}{'peak MB':>10}{'anonymous MB':>14}",
    ]
    for name, c in found["contenders"].items():
        lines.append(
            f"  {name:<12}{' '.join(f'{s:.1f}' for s in c['seconds']):>16}{c['to_cp']:>8.2f}"
            f"{' '.join(f'{s:.1f}' for s in c['cpu_seconds']):>16}"
            f"{c['peak_memory_bytes'] / 1e6:>10.0f}{c['peak_anonymous_bytes'] / 1e6:>14.0f}"
        )
    facts = found["contenders"]["self-check"]["facts"]
    lines.append(
        f"  cp until on the disk: {found['contenders']['cp']['facts']['seconds_until_on_disk']} s; ours includes that, "
        f"and the sha256 of every file; the self-check loaded {len(facts['checked_layers'])} of {n['layers']} layers"
    )
    return lines


def _evaluation_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"scoring in {found['dtype']}, up to {found['batch_tokens']} padded tokens a forward pass; {found['lm_eval']}",
        f"  {'what':<11}{'counted':>9} {'unit':<8}{'scorer':<9}{'per second':>11}{'time to ours':>14}"
        f"{'median of slices':>18}{'largest difference':>20}",
    ]
    for name, part in found["parts"].items():
        for contender, n in part["contenders"].items():
            line = f"  {name:<11}{part['counted']:>9,} {part['unit']:<8}{contender:<9}{n['per_second']:>11,.2f}"
            if "time_to_ours" in n:
                line += f"{n['time_to_ours']:>14.2f}{n['median_time_to_ours']:>18.2f}"
                line += f"{n['largest_relative_difference']:>20.1e}"
            lines.append(line)
    return lines


def _gpu_table(found: dict[str, Any]) -> list[str]:
    lines = [f"MiniMax-M2's layers on one GPU{', at toy size: these numbers mean nothing' if found['toy'] else ''}"]
    lines.append(f"  {'base, adapter':<14}{'layers':>7}{'tokens/s':>10}{'MFU':>7}{'peak GiB':>10}{'predicted GiB':>16}")
    for name, n in found["minimax_m2"].items():
        if "skipped" in n:
            lines.append(f"  {name:<14} not measured: {n['skipped']}")
            continue
        predicted = " to ".join(f"{size / 2**30:.1f}" for size in n["predicted_bytes"])
        lines.append(
            f"  {name:<14}{n['layers']:>7}{n['tokens_per_second']:>10,.1f}{n['model_utilisation']:>7.1%}"
            f"{n['peak_memory_bytes'] / 2**30:>10.1f}{predicted:>16}"
        )
    n, merge = found["extrapolation"], found["merge"]
    rates, memory = n["tokens_per_second"], " to ".join(map(str, n["predicted_gib_per_gpu"]))
    lines += [
        f"  extrapolated to {n['layers']} layers on {n['gpus']} GPUs: {rates['hidden']:,.0f} tokens/s if gathering "
        f"weights is hidden, {rates['not_hidden']:,.0f} if not; {memory} GiB each predicted",
        "  assumed: a layer runs as fast there, embeddings and head as efficiently, weights gathered twice over NVLink",
        f"  float32 parity, parts active to composed: MiniMax-M2 {_parity(found['parity_minimax_m2'])}, dense "
        f"{_parity(found['parity_dense'])}; merged and reloaded {merge['max_logit_difference']:.1e} of a largest logit "
        f"{merge['largest_logit']:.3g}, in {merge['seconds']} s",
        *("", "the dense model:", *_training_table(found["training"]), "", *_inference_table(found["inference"])),
    ]
    steps = {name: c["step_memory_bytes"] for name, c in found["training"]["contenders"].items()}
    if any(steps.values()):
        lines.append(
            "  memory of a step: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in steps.items())
        )
    return lines


def _parity(found: dict[str, float]) -> str:
    return f"{found['parts_active_to_composed']:.1e}"


def _plot_inference(figure: Any, found: dict[str, Any]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    models = [name for name in found["cells"][0]["models"] if name != "base"]
    labels = [f"{cell['prompt_tokens']} tokens\nbatch {cell['batch_size']}" for cell in found["cells"]]
    width = 0.8 / len(models)
    panels = (("prefill_to_base", "time to first token"), ("decode_to_base", "time per further token"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for at, model in enumerate(models):
            heights = [cell["models"][model][key] for cell in found["cells"]]
            places = [i + (at - (len(models) - 1) / 2) * width for i in range(len(labels))]
            axis.bar(places, heights, width, label=model, color=COLOURS[model])
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_title(title)
    axes[0].set_ylabel("times the base model")
    axes[0].legend()


def _plot_training(figure: Any, found: dict[str, Any]) -> None:
    axis = figure.subplots()
    for name, numbers in found["contenders"].items():
        bar = axis.bar(name, numbers["tokens_per_second"], color=COLOURS[name])
        axis.bar_label(bar, [f"{numbers['share_of_peak']:.0%} of the machine's peak"])
    axis.set_ylabel("trained tokens per second")


def _plot_data(figure: Any, found: dict[str, Any]) -> None:
    time_axis, memory_axis = figure.subplots(1, 2)
    sizes = [n["corpus_bytes"] / 1e6 for n in found["preparations"]]
    time_axis.plot(sizes, [n["seconds"] for n in found["preparations"]], marker="o")
    time_axis.set_ylabel("seconds")
    for key, label in (("peak_memory_bytes", "with mapped files"), ("peak_anonymous_bytes", "without")):
        memory_axis.plot(sizes, [n[key] / 1e6 for n in found["preparations"]], marker="o", label=label)
    memory_axis.set_ylabel("peak resident MB")
    memory_axis.legend()
    for axis in (time_axis, memory_axis):
        axis.set_xlabel("MB of jsonl")
        axis.set_ylim(bottom=0)


def _plot_merge(figure: Any, found: dict[str, Any]) -> None:
    time_axis, memory_axis = figure.subplots(1, 2)
    for name, c in found["contenders"].items():
        seconds = sum(c["seconds"]) / len(c["seconds"])
        time_axis.bar_label(time_axis.bar(name, seconds, color=COLOURS[name]), [f"{c['to_cp']:.1f} x cp"], fontsize=8)
        memory_axis.bar(name, c["peak_anonymous_bytes"] / 1e6, color=COLOURS[name])
    time_axis.set_ylabel("seconds")
    memory_axis.axhline(found["checkpoint"]["largest_file_bytes"] / 1e6, color="black", linewidth=0.8)
    memory_axis.set_ylabel("peak MB without mapped files; line: largest file")


def _plot_evaluation(figure: Any, found: dict[str, Any]) -> None:
    for axis, (name, part) in zip(figure.subplots(1, len(found["parts"])), found["parts"].items(), strict=True):
        for contender, numbers in part["contenders"].items():
            bar = axis.bar(contender, numbers["per_second"], color=COLOURS[contender])
            axis.bar_label(bar, [f"{numbers['time_to_ours']:.1f} x our time" if "time_to_ours" in numbers else ""])
        axis.set_title(name)
        axis.set_ylabel(f"{part['unit']} per second")
