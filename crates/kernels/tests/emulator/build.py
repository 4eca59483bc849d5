"""Compiles a source of kernels for the host: inline PTX is dropped, emu.h or hopper.h has those functions. Arguments: the source, the library
that is made of it, -D options."""
import os
import re
import subprocess
import sys

source, out, *defines = sys.argv[1:]
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
# Those for Hopper keep all of theirs in one file.
text, hopper = re.subn(r"// begin of instructions\n.*// end of instructions\n", "", text, flags=re.S)
for name in re.findall(r"__launch_bounds__\([\w, ]*\)\s*(\w+)\s*\(", text):
    text += f"""
static void emu_body_{name}(void **p) {{ emu::call({name}, p); }}
extern "C" void emu_entry_{name}(void **p, unsigned *g, unsigned *d) {{ emu::launch(emu_body_{name}, p, g, d); }}
"""
open(source, "w").write(text)
header = f"{here}/hopper.h" if hopper else f"{here}/emu.h"
flags = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", *defines, "-include", header]
found = subprocess.run(["g++", *flags, source, "-o", out], capture_output=True, text=True)
open(out + ".log", "w").write(found.stderr)
sys.exit(found.returncode)
