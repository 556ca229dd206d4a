"""The page to talk to the models, which the server has at `/`: one file that asks no other address for anything.

It is put together of page.html, page.css and page.js.
Its Content-Security-Policy allows its own script and style by their hashes, and requests to this server alone. What a
model writes is put into the page as text, so it is never markup; if it were by mistake, it could run and load nothing.
"""

import base64
import functools
import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).parent
PART = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


@functools.cache
def content() -> bytes:
    """Returns the page."""
    html, style, script = ((FOLDER / f"page.{kind}").read_bytes() for kind in ("html", "css", "js"))
    filled = html.replace(b"<style></style>", b"<style>\n%b</style>" % style)
    return filled.replace(b"<script></script>", b"<script>\n%b</script>" % script)


@functools.cache
def headers() -> dict[str, str]:
    """Returns the headers that the page is sent with."""
    hashes = {"script": "'none'", "style": "'none'"}
    for kind, text in PART.findall(content()):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        hashes[kind.decode()] = f"'sha256-{digest}'"
    policy = {
        "default-src": "'none'",
        "img-src": "data:",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
