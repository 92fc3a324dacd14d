"""Where a number comes from: code, command, machine and day, and the Markdown file that collects the numbers."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("RESULTS.md")


def code_version() -> str:
    """Commit of the working tree and a hash of the package's files, which also tells uncommitted changes apart."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    git = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{git.stdout.strip() or 'no commit'}, src {digest.hexdigest()[:10]}"


def machine() -> str:
    """Processor, cores, memory and the versions that timings depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = (names or [platform.processor() or platform.machine()])[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def shown_command() -> str:
    """The command line that is running; absolute paths are cut to their last two parts."""
    words = [f"{Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return "python " + " ".join("/".join(Path(w).parts[-2:]) if Path(w).is_absolute() else w for w in words)


def provenance() -> str:
    """Command, code, machine and day, as Markdown."""
    day = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"`{shown_command()}`  \ncode {code_version()}; {day}  \n{machine()}"


def write_section(title: str, body: str, file: Path = RESULTS) -> None:
    """Puts a section into the Markdown file, in the place of an older one with the same title.

    Args:
        title: of the section.
        body: Markdown without headings of the second level; the provenance is added in front.
        file: created if it is not there.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n"
    section = f"## {title}\n\n{provenance()}\n\n{body.strip()}\n\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text)
    else:
        text = text.rstrip() + "\n\n" + section
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.rstrip() + "\n", encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column holds names, the others numbers."""
    rule = "|".join([" --- ", *[" ---: "] * (len(head) - 1)])
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
