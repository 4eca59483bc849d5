#!/usr/bin/env python3
"""Checks the relative links of all Markdown files: the file exists, inside the repository, and so does the heading.

    python3 .ci/links.py [ROOT]

Plain python3, no package. It does not fetch web addresses. It refuses links that lead out of the repository, because
a clone does not have what lies beside it. Exit status: 0 all hold, 1 at least one does not.
"""

import os
import re
import sys
import urllib.parse

SKIPPED = {"target", "runs", "node_modules", "__pycache__"}
INLINE = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\s*\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]^][^\]]*\]:\s*<?([^\s>]+)>?")
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*:")


def markdown_files(root):
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED)
        for name in sorted(files):
            if name.lower().endswith(".md"):
                yield os.path.join(folder, name)


def prose(path):
    """Line numbers and lines outside fenced code, inline code blanked."""
    fence = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            mark = FENCE.match(line)
            if fence is not None:
                if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                    fence = None
                continue
            if mark:
                fence = mark[1]
                continue
            yield number, line


def links(path):
    for number, line in prose(path):
        line = re.sub(r"(`+).*?\1", "", line)
        definition = DEFINITION.match(line)
        for target in ([definition[1]] if definition else INLINE.findall(line)):
            yield number, target


def anchors(path):
    """The names that GitHub gives the headings of a file."""
    found = {}
    for _, line in prose(path):
        heading = HEADING.match(line)
        if heading:
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = "".join(c for c in text if c.isalnum() or c in " -_").replace(" ", "-")
            times = found.get(slug, 0)
            found[slug] = times + 1
            yield slug if times == 0 else f"{slug}-{times}"


def fault(root, path, target):
    """What is wrong with a link, or None."""
    if SCHEME.match(target) or target.startswith("//"):
        return None
    name, _, anchor = target.partition("#")
    name = urllib.parse.unquote(name)
    if name.startswith("/"):
        return "absolute path"
    place = os.path.normpath(os.path.join(os.path.dirname(path), name)) if name else path
    if place != root and not place.startswith(root + os.sep):
        return "leads out of the repository"
    if not os.path.exists(place):
        return "no such file"
    if anchor and place.lower().endswith(".md") and urllib.parse.unquote(anchor).lower() not in anchors(place):
        return f"no heading #{anchor}"
    return None


def main():
    root = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else ".")
    files = checked = faults = 0
    for path in markdown_files(root):
        files += 1
        for number, target in links(path):
            checked += 1
            wrong = fault(root, path, target)
            if wrong:
                faults += 1
                print(f"{os.path.relpath(path, root)}:{number}: {target}: {wrong}", file=sys.stderr)
    print(f"{checked} links in {files} Markdown files, {faults} broken")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
