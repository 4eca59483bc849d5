"""Compares the runs of `compare.sh`: the fastest of each side, stage by stage, and the largest peak of memory.

    summary.py FOLDER_OF_RUNS OUT.json

OUT keeps every row of every run with what the machine is, so that the comparison can be made again.
"""

import json
import os
import platform
import sys
from pathlib import Path

STAGES = ["load_tokenizer", "read", "clean", "split", "tokenize", "pack", "total"]
COUNTS = ["rows_kept", "tokens", "packing_efficiency"]


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"model": names[0] if names else platform.machine(), "cores": os.cpu_count()}


def load(folder, side):
    """The runs of one side: name of the row to the row."""
    runs = []
    for path in sorted(folder.glob(f"{side}-*.json")):
        rows = json.loads(path.read_text())
        runs.append({row["name"].split(".", 1)[1]: row for row in rows})
    return runs


def fastest(runs):
    return min(runs, key=lambda run: run["total"]["value"])


def main():
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    sides = {side: load(folder, side) for side in ["buzzer", "python-1000", "python-all"]}
    best = {side: fastest(runs) for side, runs in sides.items()}
    print(f"{best['buzzer']['total']['shape']}; {processor()}; fastest of {len(sides['buzzer'])}")
    print(f"{'':<22}" + "".join(f"{side:>16}" for side in sides))
    for name in STAGES + COUNTS:
        print(f"{name:<22}" + "".join(f"{best[side][name]['value']:>16.3f}" for side in sides))
    peaks = {side: max(run["total"]["peak_memory_bytes"] for run in runs) for side, runs in sides.items()}
    print(f"{'peak memory, GiB':<22}" + "".join(f"{peak / 2**30:>16.3f}" for peak in peaks.values()))
    python = min(best[side]["total"]["value"] for side in sides if side != "buzzer")
    print(f"Buzzer is {python / best['buzzer']['total']['value']:.1f} times as fast as the faster Python run")
    record = {"processor": processor(), "runs": {side: [list(run.values()) for run in runs] for side, runs in sides.items()}}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"every run: {out}")


main()
