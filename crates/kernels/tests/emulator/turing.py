#!/usr/bin/env python3
"""Compiles the CUDA source of every operation for a T4 (compute capability 7.5), on a machine without a card.

    CUDA_ROOT=FOLDER python3 turing.py FOLDER_OF_BENCHES

The benches of training, answering and single operations run with a driver that says that it has a T4 and runs nothing (cuda.c,
cublaslt.c), in f16, which is what a T4 computes in. NVRTC compiles what they ask for, as on a card, and ptxas translates the
result for sm_75, which refuses what a T4 lacks. Beside that no PTX may mention bf16, cp.async or the larger tensor core
instructions, and there has to be something of every kernel that is launched anywhere in crates/kernels/src but on Hopper. What was found goes to
turing.txt beside this script; the status is 1 if anything is missing or unfit.

FOLDER_OF_BENCHES is target/release/deps after `cargo build --release --workspace --benches --features cuda,wgpu`. CUDA_ROOT holds
nvidia/{cuda_nvrtc,cuda_nvcc,cuda_runtime,cuda_cccl}, the unpacked wheels of these names (12.6 was used).
"""
import collections
import ctypes
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[3]
SOURCES = ROOT / "crates/kernels/src"
# Of no use on another card than Hopper, and not launched there.
HOPPER = SOURCES / "attention/hopper"
ARCH = "75"
LARGE = ["--model", "llama2-7b"]
# A bench, whether products find a cuBLASLt, and flags. Without one they end in a kernel of ours; the small shape has heads that
# the kernels with tensor cores are not for.
RUNS = [
    ("training", True, [*LARGE, "--seq", "1024", "--warmup", "0", "--steps", "1"]),
    ("training", True, [*LARGE, "--seq", "1024", "--warmup", "0", "--steps", "1", "--eight-bit", "--packing", "jeopardy"]),
    ("training", False, ["--model", "tiny", "--warmup", "0", "--steps", "1"]),
    ("decode", True, [*LARGE, "--layers", "2", "--adapter-rank", "64", "--batch", "1,8", "--prompt", "200", "--new", "16"]),
    ("decode", True, [*LARGE, "--layers", "2", "--adapter-rank", "64", "--prompt", "200", "--new", "16", "--one-by-one"]),
    ("decode", True, [*LARGE, "--layers", "2", "--prompt", "200", "--new", "16", "--int8-cache"]),
    ("kernels", True, ["--rows", "64"]),
]
UNFIT = re.compile(r"bf16|cp\.async|m16n8k16|wgmma|\btf32\b")


def compile_stub(name, folder, *flags):
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / f"lib{name}.so", HERE / f"{name.lower()}.c", *flags], check=True)


def prepare(nvidia, work):
    """The libraries and headers that a bench finds instead of a card's; the folders of libraries with and without cuBLASLt."""
    plain, whole = work / "plain", work / "whole"
    for folder in (plain, whole):
        folder.mkdir()
        compile_stub("cuda", folder, "-ldl")
        (folder / "libnvrtc.so").symlink_to(nvidia / "cuda_nvrtc/lib/libnvrtc.so.12")
    compile_stub("cublasLt", whole)
    for package in ("cuda_runtime", "cuda_cccl", "cuda_nvcc"):
        shutil.copytree(nvidia / package / "include", work / "cuda/include", dirs_exist_ok=True)
    return {False: plain, True: whole}


def newest(benches, name):
    found = [path for path in benches.glob(f"{name}-*") if re.fullmatch(rf"{name}-[0-9a-f]+", path.name)]
    if not found:
        sys.exit(f"{benches}: no bench {name}; build it with --benches --features cuda,wgpu")
    return max(found, key=lambda path: path.stat().st_mtime)


def run(binary, flags, libraries, nvidia, work, out):
    """Runs a bench; its PTX goes to `out`."""
    out.mkdir()
    paths = f"{libraries}:{nvidia / 'cuda_nvrtc/lib'}"
    env = dict(os.environ, STUB_ARCH=ARCH, EMU_OUT=str(out), CUDA_PATH=str(work / "cuda"), LD_LIBRARY_PATH=paths)
    command = [binary, "--device", "cuda", "--dtype", "f16", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-3000:]}\nbench {binary.name} {' '.join(flags)}: status {done.returncode}")


def compile_steps(nvidia, out):
    """The kernel of steps for heads of both widths and both kinds of scales, as the crate compiles it for the 8 rows that a T4 has room for."""
    out.mkdir()
    nvrtc = ctypes.CDLL(str(nvidia / "cuda_nvrtc/lib/libnvrtc.so.12"))
    source = (SOURCES / "step/kernels.cu").read_bytes()
    for width, plain, one in itertools.product((64, 128), (0, 1), (0, 1)):
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, None, 0, None, None)
        defines = dict(TILES=1, ONE=one, TABLE_ROW=128, SLICE=64, DEPTH=1, CHUNK=0, WIDTH=width, PLAIN=plain, BF16=0)
        options = [f"--gpu-architecture=compute_{ARCH}", *(f"-D{name}={value}" for name, value in defines.items())]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if status != 0:
            sys.exit(f"kernels.cu with {options}: {log.value.decode()}")
        nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
        ptx = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetPTX(program, ptx)
        (out / f"{width}-{plain}-{one}.ptx").write_bytes(ptx.value)


def translate(ptx, nvidia):
    """Entries of a PTX file with their registers, and what is wrong with it."""
    text = ptx.read_text()
    entries = re.findall(r"\.entry (\w+)", text)
    command = [nvidia / "cuda_nvcc/bin/ptxas", "-v", f"-arch=sm_{ARCH}", ptx, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    wrong = []
    if done.returncode != 0:
        wrong.append(next((line for line in done.stderr.splitlines() if "error" in line), "ptxas fails"))
    if unfit := UNFIT.search(text):
        wrong.append(f"uses {unfit[0]}")
    used = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.S)
    registers = {entry: f"{count} registers, {spilled} bytes spilled" for entry, spilled, count in used}
    return [(entry, registers.get(entry, "")) for entry in entries], wrong


def wanted():
    """Every kernel of ours: where it stands, and what its entries look like."""
    kernels = {}
    for source in sorted(SOURCES.rglob("*.rs")):
        launched = r"#\[cube\(launch[^\]]*\)\](?:\s*#\[[^\]]*\]|\s*//[^\n]*)*\s*(?:pub\S* )?fn (\w+)(?:<([^>]*)>)?"
        for name, generics in re.findall(launched, source.read_text()):
            letters = [part.split(":")[0].strip().lower() for part in generics.split(",") if part.strip()]
            pattern = "".join([name, *(rf"_{letter}_[a-z0-9]+" for letter in letters)])
            kernels[f"{source.relative_to(SOURCES)} {name}"] = pattern
    for source in sorted(set(SOURCES.rglob("*.cu")) - set(HOPPER.iterdir())):
        for name in re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^{]*?\)\s)?(\w+)\(', source.read_text()):
            kernels[f"{source.relative_to(SOURCES)} {name}"] = name
    return kernels


def main():
    benches = pathlib.Path(sys.argv[1]).resolve()
    nvidia = pathlib.Path(os.environ["CUDA_ROOT"]).resolve() / "nvidia"
    lines, failed, found = [], 0, collections.defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        libraries = prepare(nvidia, work)
        for number, (name, library, flags) in enumerate(RUNS):
            run(newest(benches, name), flags, libraries[library], nvidia, work, work / f"run{number}")
        compile_steps(nvidia, work / "steps")
        for ptx in sorted(work.glob("*/*.ptx")):
            entries, wrong = translate(ptx, nvidia)
            for entry, registers in entries:
                found[entry].add(registers)
            for what in wrong:
                failed += 1
                lines.append(f"UNFIT {entries[0][0] if entries else ptx.name}: {what}")
    for kernel, pattern in wanted().items():
        entries = sorted(entry for entry in found if re.fullmatch(pattern, entry))
        failed += not entries
        lines += [f"{kernel}: {entry}, {'; '.join(sorted(found[entry]))}" for entry in entries] or [f"{kernel}: NONE"]
    ours = sum(": NONE" not in line and "UNFIT" not in line for line in lines)
    lines.append(f"{ours} kernels of ours and {len(found)} in all compiled for sm_{ARCH}; {failed} missing or unfit")
    text = "\n".join(lines) + "\n"
    (HERE / "turing.txt").write_text(text)
    print(text, end="")
    sys.exit(failed > 0)


main()
