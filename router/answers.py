"""The answer of one request as it grows, whichever nodes it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from trueweight.protos.errors import EngineError, TrueweightError
from trueweight.protos.v1.market_pb2 import FinishReason
from trueweight.router.channel import Channel
from trueweight.router.detokenizer import TextStream
from trueweight.router.planning import Plan
from trueweight.router.settlement import Settled


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text; the output so far has ``tokens`` tokens."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The end: the text not given out before, why it ended, and what it came to. ``settled`` is
    None if the receipt was lost with the node after the last token: then it is a present."""

    text: str
    finish_reason: FinishReason
    output_tokens: int
    settled: Settled | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The end without a complete answer; nothing is charged unless ``settled`` says so."""

    error: TrueweightError
    settled: Settled | None = None


AnswerEvent = TextDelta | Completed | Failed


class Answer:
    """Output ids of all legs, their text, and how much of it the client was given.

    With streaming, a token counts as delivered once the HTTP side wrote its text; without, once
    the router has it, because the client alone decides to leave before the end, unless the router
    itself does (``withdraw``).
    """

    def __init__(self, plan: Plan, channel: Channel[AnswerEvent]) -> None:
        if plan.model.tokenizer is None:
            raise EngineError("this router has no tokenizer for the model")
        self.rest = ""
        self._plan, self._channel = plan, channel
        self._tokenizer = plan.model.tokenizer
        self._complete = self._withdrawn = False
        self._written = 0
        self.reset()

    def reset(self) -> None:
        """Starts anew; only while nothing was given out."""
        self.output: list[int] = []
        self._text = TextStream(self._tokenizer.decoder(), self._plan.stops)
        self._parts: list[str] = []
        self._stopped = False

    @property
    def delivered(self) -> int:
        """Output tokens that may be billed."""
        if self._complete:
            return len(self.output)
        if self._plan.stream:
            return min(self._written, len(self.output))
        return 0 if self._withdrawn else len(self.output)

    @property
    def is_complete(self) -> bool:
        """True once ``finish`` is through: it will be billed whole."""
        return self._complete

    @property
    def was_withheld(self) -> bool:
        """True if the router goes away and the client has nothing: it pays nothing, prompt
        included."""
        return self._withdrawn and not self.delivered

    def withdraw(self) -> None:
        """The router goes away: what was not given out yet never will be."""
        self._withdrawn = True

    def written(self, tokens: int) -> None:
        """The HTTP side gave the client the text of this many output tokens."""
        self._written = max(self._written, tokens)

    async def take(self, token_ids: tuple[int, ...], timeout_ms: float) -> int | None:
        """New ids of the running leg. Answers with how many of *these* ids are wanted once a stop
        string appeared, else None. Raises ClientGone, DeadlineExceeded."""
        before = len(self.output)
        self.output.extend(token_ids)
        piece = self._text.push(token_ids)
        if piece.stopped_at is not None:
            self._stopped = True
            del self.output[piece.stopped_at :]
        if not self._plan.stream:
            self._parts.append(piece.text)
        elif piece.text:
            await self._channel.put(TextDelta(piece.text, len(self.output)), timeout_ms)
        return len(self.output) - before if self._stopped else None

    async def finish(self, timeout_ms: float) -> None:
        """The output is complete: waits until what was streamed is written. Raises ClientGone,
        DeadlineExceeded."""
        last = self._text.finish()
        self.rest = "".join(self._parts) + last.text
        if self._plan.stream:
            await self._channel.drained(timeout_ms)
        self._complete = True

    def ended_by(self) -> FinishReason | None:
        """Why the output is complete by its own content, None if it is not."""
        if self._stopped:
            return FinishReason.STOPPED
        if self.output and self.output[-1] in self._plan.sampling.stop_token_ids:
            return FinishReason.EOS
        if len(self.output) >= self._plan.max_tokens:
            return FinishReason.LENGTH
        return None
