"""One HTML file that needs nothing else: what was seen, what was decided, when and why.

Drawn from the journal alone (and the answers that differed), so anyone who has the journal can make it again.
"""

from __future__ import annotations

import html
import math
import time
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.html import pages
from utils.html.numbers import span
from utils.rollout.controller import Decision, State, advance, share_of
from utils.rollout.edge.journal import Story, read
from utils.rollout.edge.screen import short
from utils.rollout.gate import GateVerdict
from utils.rollout.policy import FULL_BP, UNITS, Policy

_POINTS = 400


def write(journal_path: Path, examples: list[dict[str, Any]]) -> Path:
    """report.html beside the journal. Raises OSError or PipelineError when it cannot be written."""
    story = read(journal_path)
    target = journal_path.with_name("report.html")
    files.write_text(target, page(story, examples))
    return target


def page(story: Story, examples: list[dict[str, Any]]) -> str:
    """One self-contained page: outcome and reason, share and e-values over time, counts, tests, decisions, answers."""
    decisions = _decisions(story)
    state = decisions[-1][1].state if decisions else story.began
    policy, header = story.policy, story.header
    colour = {"promoted": "good", "rolled_back": "bad"}.get(state.phase, "muted")
    title = {"promoted": "Promoted", "rolled_back": "Rolled back"}.get(state.phase, "Not over")
    last = next((d.verdict for _, d in reversed(decisions) if d.verdict), None)
    seconds = (decisions[-1][0] - story.header["started_at"]) if decisions else 0.0
    canary, production = state.total.units()
    parts = [
        f"<h1 class={colour}>{title}</h1>",
        f"<p class=lead>{html.escape(state.reason or 'still running')}</p>",
        "<table class=facts>",
        *(
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>"
            for name, value in (
                ("rollout", header["id"]),
                ("candidate", _side(header["candidate"])),
                ("production", _side(header["production"])),
                ("started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(header["started_at"]))),
                ("took", span(seconds)),
                ("sessions", f"{canary:,} on the candidate, {production:,} on production"),
                ("answers cut", f"{_answers_cut(story):,}"),
            )
        ),
        "</table>",
        "<h2>Share of the traffic, and the evidence against the candidate</h2>",
        _chart(decisions, policy, header["started_at"]),
        "<p class=note>Evidence is shown as its logarithm over that of its limit: at the red line the alarm is raised."
        " It holds at any time it is looked at; over the whole rollout all metrics together raise a false alarm with"
        f" probability at most {policy.alpha:.2%}.</p>",
        "<h2>What was decided, when and why</h2>",
        _decision_table(decisions, policy, header["started_at"]),
        "<h2>Counts</h2>",
        _count_table(state),
        "<h2>Tests at the end</h2>",
        _test_table(last),
    ]
    if examples:
        parts += ["<h2>Golden prompts that the candidate lost</h2>", _example_table(examples)]
    return pages.shell(f"{title}: {header['id']}", "\n".join(parts))


def _decisions(story: Story) -> list[tuple[float, Decision]]:
    decisions, state = [], story.began
    for seen in story.observations:
        decision = advance(state, seen, story.policy)
        state = decision.state
        decisions.append((seen.at, decision))
        if state.is_over:
            break
    return decisions


def _share(state: State, policy: Policy) -> int:
    """The candidate's share as people see it: after a promotion it has everything."""
    return FULL_BP if state.phase == "promoted" else share_of(state, policy)


def _answers_cut(story: Story) -> int:
    counts = [entry.get("answers_cut") for entry in story.events]
    return sum(count for count in counts if isinstance(count, int))


def _side(side: dict[str, Any]) -> str:
    model = side.get("directory") or "given by address"
    return f"{model} at {side['address']}, digest {side['digest'][:16] or 'unknown'}"


def _chart(decisions: list[tuple[float, Decision]], policy: Policy, start: float) -> str:
    """Two panels in one SVG: share as a staircase, and per metric the log e-value against its limit."""
    if not decisions:
        return "<p>nothing was seen</p>"
    width, left, share_h, gap, ev_h = 900, 60, 120, 34, 220
    length = max(decisions[-1][0] - start, 1e-6)
    step = max(1, len(decisions) // _POINTS)
    kept = decisions[::step] + ([decisions[-1]] if (len(decisions) - 1) % step else [])

    def x(at: float) -> float:
        return left + (at - start) / length * (width - left - 150)

    stairs, before = [f"M{left},{share_h}"], share_h
    for at, decision in kept:
        y = share_h - math.sqrt(_share(decision.state, policy) / FULL_BP) * (share_h - 14)
        stairs.append(f"L{x(at):.1f},{before:.1f} L{x(at):.1f},{y:.1f}")
        before = y  # type: ignore[assignment]
    pieces = [f'<path d="{" ".join(stairs)}" fill="none" stroke="#175cd3" stroke-width="2"/>']
    for share in [0, *(s.share_bp for s in policy.steps), FULL_BP]:
        y = share_h - math.sqrt(share / FULL_BP) * (share_h - 14)
        pieces.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share / 100:g}%</text>')
        pieces.append(f'<line x1="{left}" x2="{width - 150}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
    top, bottom = share_h + gap, share_h + gap + ev_h

    def y_of(ratio: float) -> float:
        return bottom - (max(-0.5, min(ratio, 1.25)) + 0.5) / 1.75 * (bottom - top)

    for ratio, name, stroke in ((0.0, "1", "#d0d5dd"), (1.0, "limit", "#b42318")):
        y = y_of(ratio)
        pieces.append(f'<line x1="{left}" x2="{width - 150}" y1="{y:.1f}" y2="{y:.1f}" stroke="{stroke}"/>')
        pieces.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    names = [metric.name for metric in policy.metrics]
    ends: list[tuple[float, str, str]] = []
    for name, colour in zip(names, _COLOURS, strict=False):
        points, y = [], y_of(0.0)
        for at, decision in kept:
            findings = [
                f
                for f in (decision.verdict.findings if decision.verdict else ())
                if (f.metric, f.test) == (name, "worse")
            ]
            if findings:
                y = y_of(findings[0].log_e / findings[0].log_limit)
                points.append(f"{x(at):.1f},{y:.1f}")
        pieces.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        ends.append((y, name, colour))
    lowest, labels = bottom + 14.0, []
    for y, name, colour in sorted(ends, reverse=True):  # from below, each at least a line above the last one
        lowest = min(y, lowest - 14)
        labels.append(f'<text x="{width - 144}" y="{lowest + 4:.1f}" fill="{colour}">{name.replace("_", " ")}</text>')
    pieces += labels
    for tick in range(5):
        at = start + length * tick / 4
        pieces.append(f'<text x="{x(at):.1f}" y="{bottom + 34}" text-anchor="middle">{span(at - start)}</text>')
    head = (
        f'<svg class="paper" viewBox="0 0 {width} {bottom + 44}" role="img" aria-label="share and evidence over time">'
    )
    return f"{head}{''.join(pieces)}</svg>"


def _decision_table(decisions: list[tuple[float, Decision]], policy: Policy, start: float) -> str:
    rows, before = [], ("", "")
    for at, decision in decisions:
        plain = decision.reason.split(":")[0].split("(")[0]
        key = (decision.action, plain)
        if key == before or (decision.action == "hold" and before[0] == "hold" and plain.startswith("baking")):
            continue
        before = key
        share = _share(decision.state, policy) / FULL_BP
        cells = (span(at - start), decision.action, f"{share:.2%}", html.escape(decision.reason))
        rows.append(f"<tr class={decision.action}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    if len(rows) > 60:
        rows = [*rows[:30], f"<tr><td colspan=4>... {len(rows) - 60} more in journal.jsonl ...</td></tr>", *rows[-30:]]
    return _table("<tr><th>after</th><th>decision</th><th>share</th><th>why</th></tr>", rows)


def _count_table(state: State) -> str:
    rows = []
    for bp, metrics in sorted(state.total.rates.items()):
        if bp:
            units = metrics.get(UNITS, (0, 0))
            for metric in ("errors", "client_errors", "slow"):
                bad = metrics.get(metric, (0, 0))
                cells = [
                    f"{n:,} of {all_:,}" + (f" ({n / all_:.2%})" if all_ else "")
                    for n, all_ in zip(bad, units, strict=True)
                ]
                what = f"<td>{bp / 100:g}%</td><td>{metric.replace('_', ' ')}</td>"
                rows.append(f"<tr>{what}<td>{cells[0]}</td><td>{cells[1]}</td></tr>")
    pairs = [
        f"<tr><td>{metric.replace('_', ' ')}</td><td>{lost:,}</td><td>{won:,}</td><td>{equal:,}</td></tr>"
        for metric, (lost, won, equal) in state.total.pairs.items()
    ]
    traffic = _table("<tr><th>share</th><th>sessions with</th><th>candidate</th><th>production</th></tr>", rows)
    golden = _table("<tr><th>golden prompts</th><th>lost</th><th>won</th><th>equal</th></tr>", pairs) if pairs else ""
    return traffic + golden


def _test_table(verdict: GateVerdict | None) -> str:
    rows = []
    for finding in verdict.to_json()["findings"] if verdict else []:
        bad = finding["test"] in ("worse", "share")
        mark = ("alarm" if bad else "shown") if finding["reached"] else ""
        question = {"worse": "is it worse?", "share": "is the share as set?"}.get(
            finding["test"], f"{finding['test']}?"
        )
        cells = (
            finding["metric"].replace("_", " "),
            question,
            short(finding["e_value"]),
            f"{finding['limit']:,.0f}",
            mark,
        )
        rows.append(
            f"<tr class={'rollback' if mark == 'alarm' else ''}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        )
    head = "<tr><th>metric</th><th>question</th><th>e-value</th><th>limit</th><th></th></tr>"
    return _table(head, rows)


def _example_table(examples: list[dict[str, Any]]) -> str:
    rows = []
    for example in examples[-20:]:
        cells = [
            example["metric"],
            example["prompt"],
            " / ".join(example["golds"]),
            example["production"],
            example["canary"],
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell)[:400])}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>lost on</th><th>question</th><th>expected</th><th>production</th><th>candidate</th></tr>"
    return _table(head, rows)


def _table(head: str, rows: list[str]) -> str:
    """A table that scrolls in its own box where it is wider than the screen."""
    return f'<div class="scroll" tabindex="0"><table>{head}{"".join(rows)}</table></div>'


_COLOURS = ("#b42318", "#b54708", "#7a5af8", "#0e7090", "#4e5ba6", "#667085", "#c11574", "#087443")
