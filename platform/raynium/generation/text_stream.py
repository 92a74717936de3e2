"""Text from tokens as they come: whole characters only, and nothing of what ends the text. No torch."""

from collections.abc import Callable, Iterable, Sequence

# A tokenizer puts it for bytes that are no UTF-8, also for those of a character that is not whole yet.
UNKNOWN = "\ufffd"
# So many may be the beginning of one character.
MOST_PENDING = 3
# So many given tokens are decoded with the first new one, which alone may lose the space that it begins with.
CONTEXT = 8


class TextStream:
    """Of one row. The pieces that `add` and `rest` give are the text, in order."""

    def __init__(self, decode: Callable[[Iterable[int]], str], *, given: Sequence[int] = (), stops: Sequence[str] = ()):
        """given: the tokens before the text. stops: texts that end it."""
        self._decode = decode
        self._stops = stops
        # The first `_num_said` are context; of what all say, `_said` characters have been given.
        self._tokens = list(given[-CONTEXT:])
        self._num_said = len(self._tokens)
        self._said = len(decode(self._tokens))
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said by now. Once a stop has come, `stopped` is true, and there is no more to say."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        unknown = len(text) - len(text.rstrip(UNKNOWN))
        whole = text[: len(text) - min(unknown, MOST_PENDING)]
        piece, self._said = whole[self._said :], max(self._said, len(whole))
        if not unknown:
            # A boundary: what came since the last one is the context of what comes next.
            self._tokens = self._tokens[self._num_said :]
            self._num_said, self._said = len(self._tokens), len(self._decode(self._tokens))
        return self._until_stop(piece)

    def rest(self) -> str:
        """What was held back, once no token comes any more."""
        return "" if self.stopped else self._held + self._decode(self._tokens)[self._said :]

    def _until_stop(self, piece: str) -> str:
        held = self._held + piece
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        pending = max((_beginning_at_end(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - pending :]
        return held[: len(held) - pending]


def _beginning_at_end(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
