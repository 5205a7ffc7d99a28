"""Ask a running server what ``predict`` is asked, and compare the answers."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from vlmtune.config import GenerationArguments
from vlmtune.data.sample import Sample
from vlmtune.errors import EvaluationError
from vlmtune.evaluation.drawn import drawn_sample
from vlmtune.evaluation.generation import AnswerGenerator

SAMPLES = 6
SECONDS = 600


@dataclass(frozen=True)
class Check:
    """What was asked, what predict answers, and what the server answered."""

    rows: list[tuple[str, str, str]]

    @property
    def equal(self) -> int:
        """Number of answers that are equal, letter by letter."""
        return sum(mine == served for _, mine, served in self.rows)

    def text(self) -> str:
        """Return the result for people."""
        lines = [f"{self.equal} of {len(self.rows)} answers of the server equal predict's."]
        for question, mine, served in self.rows:
            if mine != served:
                lines += [f"  {question}", f"    predict: {mine}", f"    server:  {served}"]
        return "\n".join(lines)


def check_answers(
    address: str, name: str, key: str | None, model: Any, processor: Any, options: GenerationArguments
) -> Check:
    """Compare greedy answers of a server and of a model, on drawn pictures.

    Args:
        address: of the server, through ``/v1``.
        name: the model's, in requests.
        key: the server's, or ``None``.
        model: the same model, loaded here.
        processor: its processor.
        options: most new tokens.

    Raises:
        EvaluationError: the server does not answer, or lets requests in without its key.
    """
    if key is not None:
        _require_refusal(address, name)
    samples = [drawn_sample(number) for number in range(SAMPLES)]
    greedy = GenerationArguments(max_new_tokens=options.max_new_tokens, eval_batch_size=1)
    answers = [answer.text for answer in AnswerGenerator(model, processor, greedy)(samples)]
    served = [ask(address, name, key, sample, options.max_new_tokens) for sample in samples]
    return Check(list(zip((sample.prompt[-1].text for sample in samples), answers, served, strict=True)))


def ask(address: str, name: str, key: str | None, sample: Sample, max_tokens: int) -> str:
    """Ask a server for the greedy answer to a sample's question.

    Raises:
        EvaluationError: it refuses, or does not answer.
    """
    images = iter(sample.images)
    parts = [_part(part, images) for part in sample.prompt[-1].parts]
    body = {
        "model": name,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(), headers)
    try:
        # Only this server is spoken to, whatever proxy the environment names.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS) as response:
            found = json.load(response)
        return str(found["choices"][0]["message"]["content"]).strip()
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        raise EvaluationError(f"The server refused a request ({error.code}): {said}") from error
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"The server at {address} gave no answer: {error}.") from error


def _require_refusal(address: str, name: str) -> None:
    try:
        ask(address, name, "not-the-key", drawn_sample(0), 1)
    except EvaluationError as error:
        if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 401:
            return
        raise
    raise EvaluationError("The server answered a request without its API key.")


def _part(part: Any, images: Any) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    data = base64.b64encode(next(images).bytes).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
