"""One block, ready to be run on some of its tokens or samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffratio.errors import DiffratioError
from diffratio.methods.streams import Joint, Result, image_of, with_image
from diffratio.tokens.plan import Plan
from diffratio.tokens.positions import of_samples, take_positions


@dataclass
class BlockCall:
    """One block, ready to be run on some of its tokens or samples.

    Args:
        inner: the block's own forward.
        arguments: its arguments by name.
        hidden: name of the image-token argument.
        per_token: names of arguments with one entry an image token.
        per_sample: names of arguments with one entry a sample.
        attention: name of the argument, a dictionary, whose entries reach the family's own attention processor; None
            where the processors are not ours.
        streams: names of the arguments that the block returns, in its order: `hidden` alone, or beside the text.
        positions: name of the argument with the positions of all text and after them all image tokens.
    """

    inner: Callable[..., Any]
    arguments: dict[str, Any]
    hidden: str
    per_token: tuple[str, ...]
    per_sample: tuple[str, ...]
    attention: str | None = None
    streams: tuple[str, ...] = ("hidden_states",)
    positions: str | None = None

    @property
    def x(self) -> Tensor:
        """Image tokens at full length (B, N, C)."""
        x = self.arguments[self.hidden]
        assert isinstance(x, Tensor)
        return x

    @property
    def text_name(self) -> str | None:
        """Name of the argument that is a stream of text beside the image tokens; None where the family has none."""
        return next((name for name in self.streams if name != self.hidden), None)

    @property
    def entering(self) -> Result:
        """What a bypassed block gives: all streams as they came."""
        return self.x if self.text_name is None else Joint(self.x, self.arguments[self.text_name])

    def on(self, plan: Plan) -> Result:
        """Runs the block on the plan's tokens and restores the image tokens to full length (B, N, C)."""
        result = self(plan)
        return with_image(result, plan.restore(image_of(result), self.x))

    def nested(self, nested: Tensor) -> tuple[Result, Result]:
        """Runs the block on two nested sets of tokens in one call, with all of the text in each.

        Args:
            nested: the image tokens are K and after them L of the same again; places of these among the K, (B, L).

        Returns:
            Results of the K tokens, and of the L.
        """
        sizes, call, name = [self.x.shape[1] - nested.shape[1], nested.shape[1]], self, self.text_name
        if name is not None:
            text = self.arguments[name]
            call = dataclasses.replace(self, arguments={**self.arguments, name: torch.cat([text, text], dim=1)})
        result = call(nested=nested)
        upper, lower = image_of(result).split(sizes, dim=1)
        if not isinstance(result, Joint):
            return upper, lower
        texts = (None, None) if result.text is None else result.text.chunk(2, dim=1)
        return Joint(upper, texts[0]), Joint(lower, texts[1])

    def _returned(self, output: Any) -> Result:
        """What the block's own forward returns, by stream."""
        if self.text_name is None:
            assert isinstance(output, Tensor)
            return output
        by_name = dict(zip(self.streams, output, strict=True))
        return Joint(by_name[self.hidden], by_name[self.text_name])

    def __call__(self, plan: Plan | None = None, **attention: Tensor) -> Result:
        """Runs the block on the plan's tokens -> (B, K, C) and all of the text; without a plan on all tokens.

        Args:
            plan: which tokens.
            **attention: for the family's own attention processor: `key_bias` (B, K), added to the logits of each key;
                or `nested` (B, L), where the last L tokens are some of the others again and both sets keep apart.

        Raises:
            DiffratioError: such an entry, and the attention processors are not ours.
        """
        arguments = self.arguments if plan is None else self.reduced(plan.reduce(self.x), plan).arguments
        if not attention:
            return self._returned(self.inner(**arguments))
        if self.attention is None:
            raise DiffratioError(f"this transformer's attention processors are not ours: no {', '.join(attention)}")
        given: dict[str, Any] = {**(arguments.get(self.attention) or {}), **attention}
        if self.positions is not None and self.text_name is not None:
            given["text_tokens"] = arguments[self.text_name].shape[1]
        return self._returned(self.inner(**{**arguments, self.attention: given}))

    def reduced(self, x: Tensor, plan: Plan) -> BlockCall:
        """The same block on a plan's tokens, of which x (B, K, C) is the content."""
        arguments = {**self.arguments, self.hidden: x}
        for name in self.per_token:
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = plan.take(arguments[name])
        if self.positions is not None and arguments.get(self.positions) is not None:
            arguments[self.positions] = take_positions(arguments[self.positions], plan, self.x.shape[1])
        return dataclasses.replace(self, arguments=arguments)

    def select(self, samples: Tensor, hidden: bool = True) -> BlockCall:
        """The same block for some of the samples, given by index (b,).

        Args:
            samples: their indices.
            hidden: whether the image tokens are selected too; not, where `reduced` replaces them next.
        """
        arguments, batch = dict(self.arguments), self.x.shape[0]
        for name in (*((self.hidden,) if hidden else ()), *self.per_token, *self.per_sample):
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
                arguments[name] = value.index_select(0, samples)
        if self.positions is not None and arguments.get(self.positions) is not None:
            arguments[self.positions] = of_samples(arguments[self.positions], samples)
        return dataclasses.replace(self, arguments=arguments)
