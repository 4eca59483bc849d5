"""Draws learning-curve.svg, from the root:

    python3 docs/plots/learning_curve.py gather OUT benches/runs/learning-curve-DATE-CARD.json
    python3 docs/plots/learning_curve.py draw benches/runs/learning-curve-DATE-CARD.json [FILE.svg]

`gather` takes the numbers, and no clue, out of the folder that the runs left: `base/` with the records of `make_base`, `before/`
with the report of `evaluate` on the base, for each variant NAME the folder NAME of `finetune` and NAME-judged of `evaluate`, and for
checkpoints of isolated-answers that were judged the folders steps/step-NNNNNN.
"""
import json
import sys
from pathlib import Path

TARGET = "docs/plots/learning-curve.svg"
VARIANTS = {
    "isolated-answers": "isolated, loss on answers",
    "isolated-all": "isolated, loss on all tokens",
    "wrapped-answers": "concatenated, loss on answers",
    "wrapped-all": "concatenated, loss on all tokens",
}
COLOURS = {"isolated-answers": "#1f4e9c", "isolated-all": "#7aa6e8", "wrapped-answers": "#b3402a", "wrapped-all": "#eda08f"}
# Points of a line of steps at most: each is the mean of its neighbours.
POINTS = 120
# Four panels in two rows; HEIGHT is a row's.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 1000, 380, 56, 34, 58, 24
PANEL = (WIDTH - 2 * LEFT - 2 * GAP) / 2


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def thinned(steps):
    """Means over stretches of equal length: [last step, loss, tokens a second]."""
    stretch = -(-len(steps) // POINTS)
    parts = [steps[i : i + stretch] for i in range(0, len(steps), stretch)]
    mean = lambda part, key: sum(step[key] for step in part) / len(part)
    rate = lambda part: sum(step["tokens"] for step in part) / sum(step["seconds"] for step in part)
    return [[part[-1]["step"], round(mean(part, "loss"), 4), round(rate(part))] for part in parts]


def curve(folder):
    lines = records(folder)
    steps = [line for line in lines if line["kind"] == "step"]
    held_out = [line for line in lines if line["kind"] == "held-out"]
    losses = lambda key: [[line["step"], line[key]] for line in held_out if key in line]
    shares = [step["mfu"] for step in steps if "mfu" in step]
    return {
        "steps": thinned(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "mean_mfu": sum(shares) / len(shares) if shares else None,
        "steps_with_mfu": len(shares),
        "held_out_all": losses("loss_all"),
        "held_out_answers": losses("loss_answers"),
    }


def judged(folder):
    report = json.loads((folder / "report.json").read_text())
    assessment = report["assessment"]
    kept = {key: assessment[key] for key in ("all", "triviaqa", "answers", "leaks", "calibration")}
    kept["precision_at_70"] = (assessment["precision"] or {}).get("at_70")
    kept["answer_type"] = assessment["by"].get("answer_type")
    kept["compared"] = [
        {**compared, "with": Path(compared["with"]).name} for compared in report["compared"]
    ]
    kept["seconds"] = report["seconds"]
    return kept


def judged_steps(folder):
    """Exact match of checkpoints: step, share, its interval."""
    reports = sorted(folder.glob("step-*/report.json"))
    groups = [json.loads(report.read_text())["assessment"]["all"] for report in reports]
    steps = [int(report.parent.name.removeprefix("step-")) for report in reports]
    interval = lambda group: [group["exact_match_interval"][end] for end in ("low", "high")]
    return [[step, group["n"], group["exact_match"], *interval(group)] for step, group in zip(steps, groups)]


def gather(out, target):
    names = [name for name in VARIANTS if (out / f"{name}-judged" / "report.json").is_file()]
    base = json.loads((out / "base" / "report.json").read_text())
    numbers = {
        "card": (out / "card.txt").read_text().splitlines()[-1] if (out / "card.txt").is_file() else None,
        "base": {"report": base, **curve(out / "base")},
        "before": judged(out / "before"),
        "judged_steps": judged_steps(out / "steps"),
        "variants": {name: {**curve(out / name), **judged(out / f"{name}-judged")} for name in names},
    }
    target.write_text(json.dumps(numbers, indent=1) + "\n")


class Panel:
    """Axes of one of the four plots, and what is drawn over them."""

    def __init__(self, place, title, x_name, x_range, y_range, y_ticks):
        self.left, self.above = LEFT + place % 2 * (PANEL + LEFT + GAP), place // 2 * HEIGHT
        self.x_range, self.y_range = x_range, y_range
        middle = self.left + PANEL / 2
        self.out = [
            f'<text x="{middle:.0f}" y="{self.above + 20}" text-anchor="middle" font-size="15">{title}</text>',
            f'<text x="{middle:.0f}" y="{self.above + HEIGHT - 12}" text-anchor="middle">{x_name}</text>',
        ]
        for tick in y_ticks:
            at = self.y(tick)
            self.out.append(f'<line x1="{self.left}" x2="{self.left + PANEL:.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
            self.out.append(f'<text x="{self.left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')

    def x(self, value):
        low, high = self.x_range
        return self.left + PANEL * (value - low) / (high - low)

    def y(self, value):
        low, high = self.y_range
        return self.above + TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def under(self, row=0):
        """Where a row of words under the axis stands."""
        return self.above + HEIGHT - BOTTOM + 16 + 14 * row

    def x_ticks(self, ticks):
        for tick in ticks:
            self.out.append(f'<text x="{self.x(tick):.1f}" y="{self.under()}" text-anchor="middle">{tick:,}</text>')

    def line(self, points, colour, width=2, dots=False):
        places = [(self.x(x), self.y(y)) for x, y in points]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{text}"/>')
        if dots:
            self.out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]

    def bar(self, at, low, high, colour="black"):
        x = self.x(at)
        self.out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.y(low):.1f}" y2="{self.y(high):.1f}" stroke="{colour}"/>')

    def legend(self, entries):
        top = self.above + TOP + 14
        width = 44 + 7 * max(len(name) for name, _ in entries)
        left, height = self.left + PANEL - width, 17 * len(entries) + 2
        self.out.append(f'<rect x="{left:.0f}" y="{top - 10}" width="{width}" height="{height}" fill="white" fill-opacity="0.8"/>')
        for i, (name, colour) in enumerate(entries):
            at = top + 17 * i
            right = self.left + PANEL
            self.out.append(f'<line x1="{right - 26:.0f}" x2="{right - 4:.0f}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="3"/>')
            self.out.append(f'<text x="{right - 32:.0f}" y="{at + 4}" text-anchor="end">{name}</text>')


def ticks_between(low, high, count=6):
    """Round numbers from the lower to the upper end."""
    rough = (high - low) / count
    size = next(m * 10**e for e in range(-4, 9) for m in (1, 2, 5) if m * 10**e >= rough)
    first = -(-low // size)
    return [round((first + i) * size, 6) for i in range(int((high - first * size) / size + 1e-9) + 1)]


def spanned(lines):
    values = [y for line in lines for _, y in line]
    margin = 0.06 * (max(values) - min(values) or 1)
    return min(values) - margin, max(values) + margin


def steps_axis(lines):
    return 0, max(x for line in lines for x, _ in line)


def base_panel(base):
    # The first losses would flatten the rest.
    trained = [(step, loss) for step, loss, _ in base["steps"]][2:]
    held_out = base["held_out_all"]
    span = spanned([trained, held_out])
    panel = Panel(0, "the base, from nothing", "step", steps_axis([trained]), span, ticks_between(*span))
    panel.x_ticks(int(tick) for tick in ticks_between(0, panel.x_range[1], 4))
    panel.line(trained, "#1f4e9c")
    panel.line(held_out, "#b3402a", dots=True)
    panel.legend([("trained, nats a token", "#1f4e9c"), ("clues aired later", "#b3402a")])
    return panel


def runs_panel(variants):
    lines = {name: run["held_out_answers"] for name, run in variants.items()}
    span = spanned(lines.values())
    panel = Panel(1, "fine-tuning: loss on later answers", "step", steps_axis(lines.values()), span, ticks_between(*span))
    panel.x_ticks(int(tick) for tick in ticks_between(0, panel.x_range[1], 4))
    for name, points in lines.items():
        panel.line(points, COLOURS[name], dots=True)
    panel.legend([(VARIANTS[name], COLOURS[name]) for name in lines])
    return panel


def scores_panel(before, variants):
    bars = [("before", before["all"], "#888")]
    bars += [(name, run["all"], COLOURS[name]) for name, run in variants.items()]
    top = max(100 * group["exact_match_interval"]["high"] for _, group, _ in bars) * 1.1 or 1
    title = f"exact match on {before['all']['n']:,} later clues, %"
    panel = Panel(2, title, "with 95 % intervals", (0, len(bars)), (0, top), ticks_between(0, top))
    for place, (name, group, colour) in enumerate(bars):
        share, interval = 100 * group["exact_match"], group["exact_match_interval"]
        left, right = panel.x(place + 0.2), panel.x(place + 0.8)
        panel.out.append(f'<rect x="{left:.1f}" y="{panel.y(share):.1f}" width="{right - left:.1f}" height="{panel.y(0) - panel.y(share):.1f}" fill="{colour}"/>')
        middle = (left + right) / 2
        panel.bar(place + 0.5, 100 * interval["low"], 100 * interval["high"])
        for row, word in enumerate(name.replace("wrapped", "concatenated").split("-")):
            panel.out.append(f'<text x="{middle:.1f}" y="{panel.under(row)}" text-anchor="middle" font-size="12">{word}</text>')
    return panel


def steps_panel(before, judged):
    """Exact match of one run's checkpoints, from the base on."""
    interval = before["all"]["exact_match_interval"]
    first = [0, before["all"]["n"], before["all"]["exact_match"], interval["low"], interval["high"]]
    points = [first, *judged]
    top = max(100 * high for *_, high in points) * 1.1 or 1
    title = "exact match over the steps, isolated, loss on answers, %"
    panel = Panel(3, title, "step, with 95 % intervals", (0, points[-1][0]), (0, top), ticks_between(0, top))
    panel.x_ticks(int(tick) for tick in ticks_between(0, panel.x_range[1], 4))
    colour = COLOURS["isolated-answers"]
    panel.line([(step, 100 * share) for step, _, share, *_ in points], colour, dots=True)
    for step, _, _, low, high in points:
        panel.bar(step, 100 * low, 100 * high, colour)
    return panel


def draw(source, target):
    numbers = json.loads(source.read_text())
    variants = numbers["variants"]
    panels = [base_panel(numbers["base"]), runs_panel(variants), scores_panel(numbers["before"], variants)]
    if numbers["judged_steps"]:
        panels.append(steps_panel(numbers["before"], numbers["judged_steps"]))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * HEIGHT}" font-family="sans-serif" font-size="13">'
    parts = [head, '<rect width="100%" height="100%" fill="white"/>']
    parts += [part for panel in panels for part in panel.out]
    target.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["gather", out, target]:
            gather(Path(out), Path(target))
        case ["draw", source]:
            draw(Path(source), Path(TARGET))
        case ["draw", source, target]:
            draw(Path(source), Path(target))
        case _:
            sys.exit(__doc__)
