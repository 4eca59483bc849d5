"""TensorBoard's reading of a run's events, against the run's own metrics.jsonl.

usage: events.py RUN_DIR

Exit status 1 if a series is missing, or a value or step differs by more than f32 has digits.
"""
import importlib.metadata
import json
import math
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = sys.argv[1]
events = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0})
events.Reload()
expected = {}


def expect(tag, record, value):
    if value is not None:
        expected.setdefault(tag, []).append((record["step"], record["time"], value))


for line in open(f"{run}/metrics.jsonl"):
    record = json.loads(line)
    if record["kind"] == "step":
        expect(f"loss/train_{record['loss_on']}", record, record["loss"])
        expect("train/learning_rate", record, record["learning_rate"])
        expect("train/gradient_norm", record, record.get("grad_norm"))
        expect("train/loss_scale", record, record["loss_scale"])
        expect("train/skipped", record, float(record["skipped"]))
        expect("speed/tokens_per_second", record, record["tokens_per_second"])
        expect("speed/loss_tokens_per_second", record, record["loss_tokens_per_second"])
        expect("speed/mfu", record, record.get("mfu"))
        expect("memory/gibibytes", record, record["memory_bytes"] / 2**30)
    elif record["kind"] == "held-out":
        expect("loss/held_out_all", record, record.get("loss_all"))
        expect("loss/held_out_answers", record, record.get("loss_answers"))
    else:
        expect("accuracy/exact_match", record, record["exact_match"])
        expect("accuracy/f1", record, record["f1"])

print("tensorboard", importlib.metadata.version("tensorboard"), " events file version", events.file_version)
failed = sorted(events.Tags()["scalars"]) != sorted(expected)
for tag, points in sorted(expected.items()):
    found = events.Scalars(tag)
    equal = len(found) == len(points) and all(
        scalar.step == step and math.isclose(scalar.value, value, rel_tol=1e-6) and abs(scalar.wall_time - time) < 1e-3
        for scalar, (step, time, value) in zip(found, points)
    )
    failed |= not equal
    print(f"{tag:<30} {len(found):>4} of {len(points):>4} points, last {found[-1].value:.6g}{'' if equal else '  FAILED'}")
sys.exit(failed)
