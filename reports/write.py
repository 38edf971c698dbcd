"""A report as files: HTML, Markdown, CSV and figures, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvsim.reports.cells import markdown_table, markdown_text
from kvsim.reports.folder import all_or_nothing
from kvsim.reports.names import PAIR_NAMES, PLAN_NAMES, RUN_NAMES
from kvsim.reports.report import Code, Report

NAMES = {"run": RUN_NAMES, "plan": PLAN_NAMES, "pair": PAIR_NAMES}


def write_report(report: Report, kind: str, out_dir: str | os.PathLike[str]) -> list[Path]:
    """kind: a key of NAMES. Returns the paths written; raises InputError if out_dir cannot be written."""
    with all_or_nothing(out_dir, NAMES[kind]) as workspace:
        made = write_into(report, workspace)
    return [Path(out_dir) / path.name for path in made]


def write_into(report: Report, folder: Path, *, text: bool = True, figures: bool = True) -> list[Path]:
    """text: HTML, Markdown and CSV. figures: each chart as PNG and SVG."""
    made = []
    if text:
        from kvsim.reports.html.page import page

        files = {f"{report.stem}.html": page(report), f"{report.stem}.md": markdown(report, figures), **report.csv_files}
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", newline="\n")
            made.append(folder / name)
    for chart in report.charts() if figures else ():
        from kvsim.reports.figures.chart import save

        made += save(chart, folder)
    return made


def markdown(report: Report, figures: bool = True) -> str:
    """figures: whether the pictures lie beside it."""
    return "\n".join(_markdown_parts(report, figures))


def _markdown_parts(report: Report, figures: bool) -> Iterator[str]:
    yield f"# {markdown_text(report.title)}\n"
    yield f"{markdown_text(report.what)} by kvsim.\n"
    yield "".join(f"{markdown_text(sentence)}\n\n" for sentence in report.lead)
    yield "".join(f"> **Warning.** {markdown_text(warning)}\n\n" for warning in report.warnings)
    yield "".join(f"- {markdown_text(label)}: {markdown_text(value)}\n" for label, value in report.facts)
    for section in report.sections:
        yield f"## {markdown_text(section.title)}\n"
        for part in section.parts:
            if part.kind == "table":
                yield f"**{markdown_text(part.title)}**\n"
                yield markdown_table(part)
                yield f"{markdown_text(part.caption)}\n" if part.caption else ""
            elif part.kind == "chart":
                if figures:
                    yield f"![{markdown_text(part.title)}]({part.name}.png)\n"
                    yield f"{markdown_text(part.caption)}\n" if part.caption else ""
            elif part.kind == "code":
                yield f"{markdown_text(part.title)}:\n\n{_fenced(part)}"
            else:
                bullet = "- " if len(part.lines) > 1 else ""
                yield "".join(f"{bullet}{markdown_text(line)}\n" for line in part.lines)


def _fenced(code: Code) -> str:
    """A fence longer than any in the text."""
    longest = max((len(line) - len(line.lstrip("`")) for line in code.text.splitlines()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{code.text}\n{fence}\n"
