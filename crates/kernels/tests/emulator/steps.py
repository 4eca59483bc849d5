#!/usr/bin/env python3
"""Runs the kernel of steps on the CPU and compares it with a plain forward pass in f64 (x86-64 Linux, g++; a minute).

    python3 steps.py

Small models are run in bf16, with heads in groups and without, rows and columns that are not full, layers without corrections, scales
of 0, one to seven blocks, threads in either order. The source is the crate's; only its inline PTX is replaced by what steps.h has instead.
The status is 1 if logits differ by more than rounding explains, if a second run gives other bits, or if a step does not end.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src/step/kernels.cu"
FLAGS = ["g++", "-std=c++17", "-O2", "-fno-strict-aliasing", "-w"]
# Bodies of the functions that are made of PTX.
BODIES = {
    "multiply": "emu::mma(c, a0, a1, a2, a3, b0, b1);",
    "thread_number": "return threadIdx.x;",
    "copy_16": "emu::begin_copy(to, from, 16);",
    "copy_4": "emu::begin_copy(to, from, 4);",
    "end_copies": "emu::end_group();",
    "wait_for_copies": "emu::wait_for_groups(PENDING);",
    "prefetch": "",
    "shared_16": "return emu::load<uint4>(from);",
    "shared_8": "return emu::load<uint2>(from);",
    "shared_4": "return emu::load<u32>(from);",
}
# Single statements, and what the warp does in step on a card but fibers do one after the other.
STATEMENTS = [
    (r'asm volatile\("red\.[\w.]*add\.\w+ \[%0\], 1;" ::"l"\((.*?)\) : "memory"\)', r"++*(\1)"),
    (r'asm volatile\("red\.[\w.]*add\.\w+ \[%0\], %1;" ::"l"\((.*?)\), "\w"\((.*?)\) : "memory"\)', r"*(\1) += \2"),
    (r'asm volatile\("st\.global\.\w+ \[%0\], %1;" ::"l"\((.*?)\), "\w"\((.*?)\) : "memory"\)', r"*(\1) = \2"),
    (r'asm volatile\("ld\.relaxed\.[\w.]* %0, \[%1\];" : "=r"\((.*?)\) : "l"\((.*?)\) : "memory"\);', r"{ emu::yield(emu::RUNS); \1 = *(\2); }"),
    (r"sum = \*\(volatile const long long \*\)from;", "{ emu::yield(emu::RUNS); sum = *from; }"),
    (r"Position now = \*s\.position;", "Position now = *s.position; __syncwarp();"),
    (r"\*s\.position = now;", "*s.position = now; __syncwarp();"),
    (r"extern __shared__ __align__\(16\) unsigned char memory\[\];", "unsigned char *memory = emu::shared() + emu::RESERVED;"),
]
ENTRY = """
static void body() { run_step(0); emu::finish(); }
extern "C" int emulate(const Step *what, unsigned blocks, int backwards) {
  step = *what;
  return emu::run(body, blocks, backwards);
}
"""
# TILES, ONE, TABLE_ROW, SLICE, DEPTH, CHUNK, PLAIN; then cases: tokens, blocks, backwards, grouped heads, rank.
VARIANTS = [
    ((1, 1, 256, 128, 2, 0, 0), [(1, 5, 0, 0, 64), (1, 3, 1, 1, 128)]),
    ((1, 1, 128, 64, 1, 0, 1), [(1, 3, 0, 1, 64)]),
    ((1, 0, 256, 128, 2, 0, 0), [(8, 3, 1, 1, 64), (3, 4, 0, 0, 0)]),
    ((2, 0, 128, 64, 1, 512, 0), [(13, 5, 0, 1, 64), (16, 3, 1, 0, 64)]),
    ((4, 0, 256, 128, 2, 256, 0), [(32, 5, 0, 1, 64), (17, 1, 0, 1, 64), (32, 7, 1, 0, 64), (32, 6, 0, 0, 128), (9, 3, 1, 1, 0)]),
    ((4, 0, 128, 64, 3, 128, 0), [(32, 7, 0, 1, 64)]),
    ((4, 0, 128, 256, 1, 512, 1), [(32, 5, 0, 0, 64)]),
]


def replace_body(text, name, body):
    found = re.search(rf"(template <[^>]*> )?__device__ __forceinline__ \w+ {name}\([^)]*\) {{", text)
    depth, end = 1, found.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[: found.end()] + f" {body} }}" + text[end:]


def emulated(text):
    """The kernel's source for the CPU."""
    for name, body in BODIES.items():
        text = replace_body(text, name, body)
    for pattern, statement in STATEMENTS:
        text, count = re.subn(pattern, statement, text)
        if count == 0:
            sys.exit(f"{SOURCE}: nothing like {pattern}")
    return f'#include "{HERE}/steps.h"\n{text}\n{ENTRY}'


def build_variant(text, variant, work):
    names = ("TILES", "ONE", "TABLE_ROW", "SLICE", "DEPTH", "CHUNK", "PLAIN")
    defines = [f"-D{name}={value}" for name, value in zip(names, variant)]
    library = work / ("-".join(map(str, variant)) + ".so")
    source = work / "kernel.cpp"
    source.write_text(text)
    subprocess.run([*FLAGS, "-shared", "-fPIC", "-DBF16=1", "-DWIDTH=64", *defines, source, "-o", library], check=True)
    return library


def build_host(text, work):
    """The program that makes models and compares, with the kernel's own structures."""
    begin, end = text.index("typedef unsigned short u16;"), text.index("// What the step is; the host puts it there.")
    (work / "structures.h").write_text(text[begin:end])
    program = work / "steps"
    subprocess.run([*FLAGS, "-I", work, "-I", HERE, HERE / "steps.cpp", "-o", program, "-ldl"], check=True)
    return program


def main():
    text, failed = SOURCE.read_text(), 0
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        program = build_host(text, work)
        for variant, cases in VARIANTS:
            library = build_variant(emulated(text), variant, work)
            for case in cases:
                print("variant", *variant, "", end="", flush=True)
                failed += subprocess.run([program, library, str(variant[-1]), *map(str, case)]).returncode != 0
    sys.exit(failed > 0)


main()
