"""Compiles one generated kernel for the host: inline PTX is dropped, emu.h has those functions."""
import os
import re
import subprocess
import sys

source, out = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
text = open(source).read()
if "void probe()" in text:
    # Whether anything can be compiled; never launched.
    text = "extern \"C\" void emu_entry(void **, unsigned *, unsigned *) {}"
    open(source, "w").write(text)
    sys.exit(subprocess.run(["g++", "-shared", "-fPIC", source, "-o", out]).returncode)
text = re.sub(r"\ninline __device__ void\n__(ldmatrix|mma)_.*?\n    }\n", "\n", text, flags=re.S)
# Asynchronous copies and barriers are emulated too.
text = re.sub(r"(template <.*>\n)?inline __device__ void\n__cp_async_\w+(<16>)?\(.*?\n}", "", text, flags=re.S)
text = re.sub(r"#include <.*>", "", text)
name = re.search(r"__launch_bounds__\(\d+\)\s*(\w+)\s*\(", text).group(1)
text += f"""
static void emu_body(void **p) {{ emu::call({name}, p); }}
extern "C" void emu_entry(void **p, unsigned *g, unsigned *d) {{ emu::launch(emu_body, p, g, d); }}
"""
open(source, "w").write(text)
flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-include", f"{here}/emu.h"]
found = subprocess.run(["g++", *flags, source, "-o", out], capture_output=True, text=True)
open(out + ".log", "w").write(found.stderr)
sys.exit(found.returncode)
