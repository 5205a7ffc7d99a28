"""One model, many who ask: requests that wait are answered together, with the code that ``predict`` answers with."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.generation import Answer, AnswerGenerator
from vlmtune.serving.requests import ChatRequest, RequestError


@dataclass
class Reply:
    """An answer and the length of its prompt in tokens."""

    answer: Answer
    prompt_tokens: int


@dataclass
class _Waiting:
    request: ChatRequest
    prompt_tokens: int
    future: Future[Reply] = field(default_factory=Future)


class Engine:
    """Answers requests in a thread of its own.

    Args:
        model: ready to generate.
        processor: its processor.
        max_pixels: of an image.
        waiting: most requests that may wait.
    """

    def __init__(self, model: Any, processor: Any, *, max_pixels: int | None = None, waiting: int = 256) -> None:
        self.generator = AnswerGenerator(model, processor, max_pixels=max_pixels)
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="vlmtune-engine", daemon=True)
        self._thread.start()

    def submit(self, request: ChatRequest) -> Future[Reply]:
        """Queue a request.

        Raises:
            RequestError: its prompt cannot be encoded or is too long, or too many wait already.
        """
        try:
            tokens = len(self.generator.encoder.prompt(request.sample, pixels=False).input_ids)
        except VlmtuneError as error:
            raise RequestError(str(error), parameter="messages") from error
        most = tokens + request.options.max_new_tokens
        if self.context is not None and most > self.context:
            raise RequestError(
                f"The prompt has {tokens} tokens and max_tokens is {request.options.max_new_tokens}; the model takes "
                f"{self.context} together.",
                parameter="messages",
                code="context_length_exceeded",
            )
        waiting = _Waiting(request, tokens)
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise RequestError("Too many requests are waiting. Try again.", status=429) from None
        return waiting.future

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            found, last = [first], False
            # What came in meanwhile goes along.
            while not self._queue.empty() and len(found) < first.request.options.eval_batch_size:
                following = self._queue.get_nowait()
                if following is None:
                    last = True
                    break
                found.append(following)
            alike: dict[Any, list[_Waiting]] = defaultdict(list)
            for one in found:
                request = one.request
                # A drawn answer depends on its batch, so it gets its own.
                alone = (request.id, request.seed) if request.options.temperature else None
                alike[tuple(vars(request.options).values()), alone].append(one)
            for group in alike.values():
                self._answer(group)
            if last:
                return

    def _answer(self, group: list[_Waiting]) -> None:
        group = [one for one in group if one.future.set_running_or_notify_cancel()]
        if not group:
            return
        self.generator.options, self.generator.seed = group[0].request.options, group[0].request.seed
        try:
            answers = self.generator([one.request.sample for one in group])
        except Exception as error:
            if len(group) == 1:
                group[0].future.set_exception(error)
                return
            for one in group:
                self._again(one)
            return
        for one, answer in zip(group, answers, strict=True):
            one.future.set_result(Reply(answer, one.prompt_tokens))

    def _again(self, one: _Waiting) -> None:
        """Answer a request alone, after one of those beside it has failed."""
        try:
            one.future.set_result(Reply(self.generator([one.request.sample])[0], one.prompt_tokens))
        except Exception as error:
            one.future.set_exception(error)
