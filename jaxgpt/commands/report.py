"""`run.py report`: one page of one run or several, written to a file or served live."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt import files, writing
from jaxgpt.errors import UserError
from jaxgpt.options import command_line
from jaxgpt.options.command_line import nearest
from jaxgpt.reports import live_report, page
from jaxgpt.reports.history import History
from jaxgpt.reports.live_report import REPORT
from jaxgpt.terminal import command, say

MOST = 16  # runs in a page: more than the curves' colours tell apart


@dataclass(frozen=True)
class Report:
    """Writes a page that shows how runs are doing, several in the same charts; or serves it live."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of the runs, such as runs/quickstart."""
    output: str = ""
    """File to write the page to; empty takes the run's own report.html, and for several runs ./report.html."""
    live: bool = False
    """Serve the page on this machine until Ctrl-C, instead of writing it; it updates by itself."""
    port: int = 8050
    """Port to serve the page at; 0 takes a free one."""


def run(words: list[str]) -> int:
    """Writes or serves the page. UserError for a folder that is no run's."""
    options = command_line.read(Report, words, "report")
    folders = [Path(name) for name in dict.fromkeys(options.runs)]
    _check(options, folders)
    if options.live:
        with live_report.listen(folders, options.port) as server:
            server.runs.read()  # so that damaged files are reported here
            say(f"report  {server.url} (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("\nended")
        return 0
    made = page.render([page.of_run(folder, History(folder / "metrics.jsonl").read_all()) for folder in folders])
    path = folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    if options.output:
        writing.write_output(options.output, made)
    else:  # the folder may be someone else's
        writing.write(path, made)
    without = "" if page.plotly() else ", without curves: pip install plotly adds them"
    say(f"report  {options.output or path}{without}")
    return 0


def _check(options: Report, folders: list[Path]) -> None:
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port}: must be from 0 to {2**16 - 1}")
    if not folders:
        raise UserError(f"name a run's folder, or several: {command('report', 'runs/NAME')}")
    if len(folders) > MOST:
        raise UserError(f"{len(folders)} runs are more than one page can tell apart; give at most {MOST}")
    if options.live and options.output:
        raise UserError(f"--output {options.output}: --live writes no file. Leave one of them away")
    for folder in folders:
        if not folder.is_dir():
            runs = [path.parent.name for path in folder.parent.glob("[!.]*/config.toml")]
            near = nearest(folder.name, runs)
            raise UserError(
                f"{folder}: there is no such folder{command_line.runs_near(folder) if near == '.' else near}"
            )
        if not files.exists(folder / "metrics.jsonl"):
            raise UserError(f"{folder}: not a run's folder (it has no metrics.jsonl){command_line.runs_near(folder)}")
