"""The files of the page, held in memory: thirty small modules are one round trip of the disk each."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

STATIC = Path(__file__).parent / "static"

_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class Assets:
    """What is under ``static/``, by its path there; nothing else can be asked for."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                body = path.read_bytes()
                tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
                kind = _TYPES.get(path.suffix, "text/plain")
                self._files[path.relative_to(folder).as_posix()] = (body, tag, kind)

    def answer(self, request: Request, name: str) -> Response:
        """The file, or 304 where the browser has it; an upgrade shows at the next reload."""
        if name not in self._files:
            raise HTTPException(404, f"no file of the page is called {name!r}")
        body, tag, kind = self._files[name]
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)
