"""Draws losses-300.svg from benches/runs/losses-300-2026-11-25-h100.json: python3 docs/plots/losses.py, from the root."""
import json
import math

WIDTH, HEIGHT, MARGIN = 900, 420, 50
runs = json.load(open("benches/runs/losses-300-2026-11-25-h100.json"))
reference, ours = runs["reference"], runs["bf16"]
low, high = min(reference) - 0.05, max(reference) + 0.05
last = len(reference) - 1


def x(step):
    return MARGIN + (WIDTH - MARGIN - 20) * step / last


def y(loss):
    return 20 + (HEIGHT - 20 - MARGIN) * (high - loss) / (high - low)


def line(losses, colour, width):
    points = " ".join(f"{x(i):.1f},{y(loss):.1f}" for i, loss in enumerate(losses))
    return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{points}"/>'


out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
    '<rect width="100%" height="100%" fill="white"/>',
]
for tick in range(math.ceil(2 * low), math.floor(2 * high) + 1):
    at = y(tick / 2)
    out.append(f'<line x1="{MARGIN}" x2="{WIDTH - 20}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
    out.append(f'<text x="{MARGIN - 8}" y="{at + 4:.1f}" text-anchor="end">{tick / 2}</text>')
for step in range(0, last + 2, 50):
    out.append(f'<text x="{x(min(step, last)):.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{step}</text>')
out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">step</text>')
out.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">loss, nats</text>')
out += [line(reference, "#c44e52", 4), line(ours, "#000", 1)]
box = WIDTH - 330
out.append(f'<rect x="{box}" y="28" width="300" height="46" fill="white" stroke="#ccc"/>')
for at, colour, width, name in [
    (42, "#c44e52", 4, "transformers, PEFT, bitsandbytes; f32"),
    (62, "#000", 1, "Buzzer, bf16"),
]:
    out.append(f'<line x1="{box + 10}" x2="{box + 40}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="{width}"/>')
    out.append(f'<text x="{box + 48}" y="{at + 4}">{name}</text>')
out.append("</svg>")
open("docs/plots/losses-300.svg", "w").write("\n".join(out) + "\n")
