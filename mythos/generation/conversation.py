"""A text that a person and a model write in turns."""

from collections.abc import Callable
from typing import Any

from mythos.checkpoints.stored_model import OpenedModel
from mythos.errors import MythosError
from mythos.generation.text import Depth, Piece, TextGeneration, generate_text


class Conversation:
    """The text of all turns. Each turn of the model continues as much of its end as the context has room for.

    `options` are those of :func:`mythos.generation.text.generate_text`. Turn n, counted from 0, has the seed
    `seed + n`, so that a repeated text is continued differently.

    Raises MythosError for a model without tokenizer, and for `tokens` that leave no room for a prompt.

    Attributes:
        text: what both have written; the end of a document is not part of it.
        left_out: tokens at the beginning of the text that the newest turn did not see.
    """

    def __init__(self, opened: OpenedModel, tokens: int, *, seed: int = 0, **options: Any) -> None:
        self.opened, self.tokens, self.seed, self.options = opened, tokens, seed, options
        self.tokenizer = opened.require_tokenizer()
        context = opened.model.config.context_length
        if tokens >= context:
            raise MythosError(f"--tokens: got {tokens}; give less than the model's context, {context} tokens")
        self.room = context - tokens
        self.text = ""
        self.left_out = self.turns = 0

    def begin(self) -> None:
        """Forget the text."""
        self.text, self.left_out = "", 0

    def turn(self, line: str, depth: Depth, on_piece: Callable[[Piece], None]) -> TextGeneration:
        """Add a line to the text, and let the model continue it. An empty line adds nothing.

        `on_piece` is called as pieces of text are complete. A KeyboardInterrupt ends the turn; the pieces so far stay
        in the text. Raises MythosError as `generate_text`; the text is then the one before the turn.
        """
        before = self.text
        if line:
            self.text += f"\n{line}" if self.text else line
        ids = self.tokenizer.encode_batch([self.text])[0] if self.text else []
        self.left_out = max(0, len(ids) - self.room)

        def record(_: int, piece: Piece) -> None:
            self.text += piece.text
            on_piece(piece)

        self.turns += 1
        try:
            return generate_text(
                self.opened,
                [ids[-self.room :] or None],
                self.tokens,
                depth,
                seed=self.seed + self.turns - 1,
                on_piece=record,
                **self.options,
            )
        except MythosError:
            self.text = before
            raise
