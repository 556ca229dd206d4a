"""Report as one HTML file that asks the network for nothing.

The curves are drawn by plotly.js, which comes with the Python package plotly (MIT); only that file of it is used, so
nothing of plotly is imported and a page costs no more than writing it. The choice on PyPI:

    plotly    4.8 MB of script, 2.0 MB compressed as here; figures are plain JSON, so that live updates and dark mode
              are a call each; hover across curves, zoom, touch; 10 MB to download, and one small package that it needs
    bokeh     1.3 MB, 0.5 MB compressed; figures are objects built by its Python classes, which would take the training
              process's time, and their colours are fixed where they are made; needs tornado, Jinja2 and four more
    altair    its Python package has no script in it: a page would load it from the network

Size decided less than time. The script is kept compressed in the page (base64 of gzip, which every browser since 2023
unpacks), so that a report is about 2.3 MB. plotly is one of the package's own dependencies since a report is written
for every run; where it is missing all the same, the page is written without curves and says so.

All that comes from a run goes into the page as JSON in which no character can end the script element it is in, and
onto the screen as text, never as HTML. A Content-Security-Policy forbids the page any request, so that a mistake here
would not reach the network either.
"""

import base64
import functools
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPT = "package_data/plotly.min.js"  # in plotly's package
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "


def render(runs: list[dict[str, Any]], *, live: bool = False) -> bytes:
    """Returns the page of some runs.

    Args:
        runs: What `content.of_run` returns for each.
        live: Whether the page asks the server that it came from for news.
    """
    before, between, after = _parts(live)
    data = json.dumps({"runs": runs, "live": live}, allow_nan=False, default=str)
    return before + safe(data).encode() + between + plotly() + after


def safe(data: str) -> str:
    """Returns JSON that may stand in a script element: the same values, without characters that HTML knows."""
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


@functools.cache
def _parts(live: bool) -> tuple[bytes, bytes, bytes]:
    """Returns the page before the data, between data and script, and after the script."""
    policy = POLICY + ("connect-src 'self'" if live else "connect-src 'none'")
    page = (HERE / "page.html").read_text(encoding="utf-8").replace("{policy}", policy)
    for name in ("page.css", "memory.js", "curves.js", "page.js"):
        page = page.replace(f"{{{name}}}", (HERE / name).read_text(encoding="utf-8"))
    before, rest = page.split("{data}")
    between, after = rest.split("{plotly}")
    return before.encode(), between.encode(), after.encode()


@functools.cache
def plotly() -> bytes:
    """Returns plotly.js as base64 of gzip; empty where plotly isn't installed."""
    found = importlib.util.find_spec("plotly")
    if not (found and found.origin):
        return b""
    script = Path(found.origin).parent / SCRIPT
    return base64.b64encode(gzip.compress(script.read_bytes(), 6, mtime=0)) if script.is_file() else b""
