"""The page's server: what is searched, found, played. It listens on the loopback and sends nothing but the gallery's clips."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from umt_fast.config import ConfigError
from umt_fast.data.decode.video import VideoError
from umt_fast.data.errors import DataError
from umt_fast.data.sources.captions import clean_caption
from umt_fast.demo import clips
from umt_fast.demo.gallery import Gallery
from umt_fast.extras import packages_of
from umt_fast.pretrained import PretrainedModel, VideoTextModel

MAX_TEXT = 5000
"""Characters of a query. What a model reads of it is its own limit, in tokens."""
MAX_TOP = 60
PARTS = 8
"""Parts of a clip's time line."""
_KEPT_BYTES = 64 << 20


class Refused(Exception):
    """A request that cannot be answered; its message is shown on the page."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Demo:
    """Answers of the page, apart from how they travel. The model computes for one request at a time."""

    def __init__(self, gallery: Gallery, model: PretrainedModel) -> None:
        self.gallery, self.model = gallery, model
        self.lock = threading.Lock()
        self.previews: OrderedDict[int, bytes] = OrderedDict()

    def search(self, *, text: str = "", clip: int | None = None, top: int = 12) -> dict[str, Any]:
        """`results`: row, name, score, best first; `note`: what the user should know. Neither text nor clip: the first clips.

        Raises Refused: a text that is too long or has no word, a model that reads none, an unknown clip.
        """
        if not 1 <= top <= MAX_TOP:
            raise Refused(f"top is {top}; it must lie in [1, {MAX_TOP}]", 400)
        note = ""
        if clip is not None:
            self._path(clip)
            found = self.gallery.of_clip(clip, top)
        elif text.strip():
            note = self._note(text)
            found = self.gallery.of_text(self._embedding(text), top)
        else:
            found = [(row, None) for row in range(min(top, len(self.gallery.names)))]
            note = (
                "Type what happens in a clip."
                if self.gallery.reads_texts
                else "This model reads no texts: pick a clip."
            )
        names = self.gallery.names
        return {"results": [{"row": row, "name": names[row], "score": score} for row, score in found], "note": note}

    def preview(self, row: int) -> bytes:
        """WebM of a clip. Raises Refused: unknown, or its file is gone or unreadable."""
        with self.lock:
            if row in self.previews:
                self.previews.move_to_end(row)
                return self.previews[row]
        made = self._read(row, clips.preview)
        with self.lock:
            self.previews[row] = made
            while len(self.previews) > 1 and sum(map(len, self.previews.values())) > _KEPT_BYTES:
                self.previews.popitem(last=False)
        return made

    def timeline(self, row: int, text: str) -> list[float]:
        """Similarity of a text to each of PARTS equal parts of a clip's time. Raises Refused."""
        if not text.strip():
            raise Refused("a time line compares a clip with a text; type one", 400)
        embedding = self._embedding(text)
        frames = self._read(row, lambda path: clips.parts(path, PARTS, self.model.vit.num_frames))
        with self.lock:
            return (self.model.encode_video(frames) @ embedding.to(self.model.device)).tolist()

    def _embedding(self, text: str) -> torch.Tensor:
        if not (isinstance(self.model, VideoTextModel) and self.gallery.reads_texts):
            raise Refused(f"the model is of task {self.model.task!r}, which reads no texts; pick a clip", 400)
        if len(text) > MAX_TEXT:
            raise Refused(f"the text has {len(text)} characters; give at most {MAX_TEXT}", 400)
        try:
            with self.lock:
                return self.model.encode_text([text])[0].cpu()
        except (DataError, ConfigError) as error:
            raise Refused(str(error), 400) from error

    def _note(self, text: str) -> str:
        """Says so where the model does not read all of a text."""
        if not isinstance(self.model, VideoTextModel) or len(text) > MAX_TEXT:
            return ""
        limit, words = self.model.description["max_length"], self.model.tokenizer
        read = limit - (2 if self.model.description["sep_token"] else 1)
        count = len(words(clean_caption(text), add_special_tokens=False)["input_ids"])
        return f"Only the first {read} of {count} tokens were read." if count > read else ""

    def _path(self, row: int) -> Path:
        if not 0 <= row < len(self.gallery.names):
            raise Refused(f"no clip {row}; there are {len(self.gallery.names)}, from 0", 404)
        return Path(self.gallery.names[row])

    def _read(self, row: int, read: Callable[[Path], Any]) -> Any:
        path = self._path(row)
        if not path.exists():
            raise Refused(f"{path} is not there any more", 404)
        try:
            return read(path)
        except VideoError as error:
            raise Refused(str(error), 422) from error


def application(demo: Demo, hosts: set[str]) -> Any:
    """The Flask application. hosts: names under which it may be asked, so that no page elsewhere can have a browser ask it.

    Raises MissingPackageError: no Flask.
    """
    with packages_of("demo"):
        from flask import Flask, Response, jsonify, render_template, request

    app = Flask("umt_fast.demo", template_folder=str(Path(__file__).parent))
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20

    @app.before_request
    def only_from_here() -> None:
        if urlsplit(f"//{request.host}").hostname not in hosts:
            raise Refused(f"the page is not served under the name {request.host!r}", 403)

    @app.errorhandler(Refused)
    def refused(error: Refused) -> tuple[Response, int]:
        return jsonify(error=str(error)), error.status

    @app.get("/")
    def page() -> str:
        return render_template("page.html", clips=len(demo.gallery.names), reads_texts=demo.gallery.reads_texts)

    def asked() -> dict[str, Any]:
        given = request.get_json(silent=True)
        if not isinstance(given, dict):
            raise Refused("the request is not a JSON object", 400)
        kinds = {"text": str, "clip": int, "top": int}
        for name, value in given.items():
            if name not in kinds or type(value) is not kinds[name]:
                raise Refused(f"{name!r} is {value!r}; known are text (a string), clip and top (numbers)", 400)
        return given

    @app.post("/search")
    def search() -> Response:
        return jsonify(demo.search(**asked()))

    @app.post("/timeline")
    def timeline() -> Response:
        given = asked()
        return jsonify(scores=demo.timeline(given.get("clip", -1), given.get("text", "")))

    @app.get("/preview/<int:row>.webm")
    def preview(row: int) -> Response:
        answer = Response(demo.preview(row), mimetype="video/webm", headers={"Cache-Control": "private, max-age=3600"})
        return answer.make_conditional(request, accept_ranges=True, complete_length=len(answer.get_data()))

    return app


def serve(demo: Demo, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until Ctrl-C. ready: called with the page's address. Raises ConfigError: the port cannot be had."""
    with packages_of("demo"):
        from werkzeug.serving import make_server

    hosts = {host, "localhost", "127.0.0.1", "::1"} if host in ("localhost", "127.0.0.1", "::1") else {host}
    try:
        server = make_server(host, port, application(demo, hosts), threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug ends the process where a port is taken
        raise ConfigError(
            f"{host}:{port} cannot be listened on (taken, or not this machine's); give another --port"
        ) from error
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    ready(f"http://{host}:{server.server_port}")
    with server:
        server.serve_forever()
