"""How long requests are. Each class is a YAML block with ``pairs(rng, base_dir)``: endless (prompt, output) tokens."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from kvsim.arrivals import CHUNK
from kvsim.frozen import Frozen
from kvsim.trace_files import read_lengths
from kvsim.workload_fields import MAX_TOKENS, Number, Pairs, Tokens

# Coefficients of variation (standard deviation over mean) of the 19,366 requests of AzureLLMInferenceTrace_conv.csv
# (Azure Public Dataset, LLM inference trace 2023, conversation): prompts 0.960, outputs 0.771. The logarithms of the
# two correlate by only 0.09 there, so they are drawn independently.
AZURE_2023_CONV_PROMPT_CV = 0.96
AZURE_2023_CONV_OUTPUT_CV = 0.77


def _pairs(chunk: Callable[[], np.ndarray]) -> Pairs:
    """``chunk`` gives (n, 2) whole numbers: prompt, output."""
    return chain.from_iterable(map(tuple, chunk().astype(np.int64).tolist()) for _ in repeat(None))


class Fixed(Frozen):
    """Every request the same."""

    kind: Literal["fixed"] = "fixed"
    prompt_tokens: Tokens = Field(description="tokens of every prompt")
    output_tokens: Tokens = Field(description="tokens of every answer")

    def pairs(self, rng: np.random.Generator, base_dir: Path) -> Pairs:
        return repeat((self.prompt_tokens, self.output_tokens))

    def spread(self, range_frac: float) -> Uniform:
        """Lengths uniform in [1 - range_frac, 1] of these."""

        def least(tokens: int) -> int:
            return max(1, math.ceil((1.0 - range_frac) * tokens - 1e-6))  # 0.8 * 1155 is 924, not 924.0000000000001

        return Uniform(
            prompt_min_tokens=least(self.prompt_tokens),
            prompt_max_tokens=self.prompt_tokens,
            output_min_tokens=least(self.output_tokens),
            output_max_tokens=self.output_tokens,
        )

    def describe(self) -> str:
        return f"fixed {self.prompt_tokens}/{self.output_tokens} tokens"


class Uniform(Frozen):
    """Whole numbers, equally likely between the bounds, both included; prompt and output independent."""

    kind: Literal["uniform"] = "uniform"
    prompt_min_tokens: Tokens = Field(description="shortest prompt")
    prompt_max_tokens: Tokens = Field(description="longest prompt")
    output_min_tokens: Tokens = Field(description="shortest answer")
    output_max_tokens: Tokens = Field(description="longest answer")

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        for name in ("prompt", "output"):
            least, most = getattr(self, f"{name}_min_tokens"), getattr(self, f"{name}_max_tokens")
            if least > most:
                raise ValueError(
                    f"must have {name}_min_tokens={least} at most {name}_max_tokens={most}; try exchanging them"
                )
        return self

    def pairs(self, rng: np.random.Generator, base_dir: Path) -> Pairs:
        least = np.array([self.prompt_min_tokens, self.output_min_tokens])
        sizes = np.array([self.prompt_max_tokens, self.output_max_tokens]) - least + 1
        return _pairs(lambda: least + np.floor(rng.random((CHUNK, 2)) * sizes))

    def describe(self) -> str:
        return (
            f"uniform {self.prompt_min_tokens}-{self.prompt_max_tokens}/"
            f"{self.output_min_tokens}-{self.output_max_tokens} tokens"
        )


class Lognormal(Frozen):
    """Lognormal lengths, clipped to [1, max] and rounded; prompt and output independent.

    ``*_mean_tokens`` is the mean of what is drawn, after clipping: the location is solved for. ``*_cv`` is the standard
    deviation over the mean before clipping; its default is that of the Azure 2023 conversation trace.
    """

    kind: Literal["lognormal"] = "lognormal"
    prompt_mean_tokens: Number = Field(gt=1, le=MAX_TOKENS, description="mean prompt, after clipping")
    output_mean_tokens: Number = Field(gt=1, le=MAX_TOKENS, description="mean answer, after clipping")
    prompt_cv: Number = Field(AZURE_2023_CONV_PROMPT_CV, ge=0.01, le=20, description="standard deviation over mean of prompts")
    output_cv: Number = Field(AZURE_2023_CONV_OUTPUT_CV, ge=0.01, le=20, description="standard deviation over mean of answers")
    prompt_max_tokens: Tokens | None = Field(None, description="longer prompts are cut to this")
    output_max_tokens: Tokens | None = Field(None, description="longer answers are cut to this")

    @model_validator(mode="after")
    def _mean_below_max(self) -> Lognormal:
        for name in ("prompt", "output"):
            mean, most = getattr(self, f"{name}_mean_tokens"), getattr(self, f"{name}_max_tokens")
            if most is not None and mean > 0.9 * most:
                raise ValueError(
                    f"must have {name}_mean_tokens={mean:g} at most 0.9 x {name}_max_tokens={most}; "
                    "try a larger maximum or kind: uniform"
                )
        return self

    def pairs(self, rng: np.random.Generator, base_dir: Path) -> Pairs:
        most = np.array([self.prompt_max_tokens or MAX_TOKENS, self.output_max_tokens or MAX_TOKENS])
        sigma = np.sqrt(np.log1p(np.square([self.prompt_cv, self.output_cv])))
        means = (self.prompt_mean_tokens, self.output_mean_tokens)
        mu = np.array([_location(mean, s, float(m)) for mean, s, m in zip(means, sigma.tolist(), most, strict=True)])
        return _pairs(lambda: np.rint(np.clip(np.exp(mu + sigma * rng.standard_normal((CHUNK, 2))), 1, most)))

    def describe(self) -> str:
        return f"lognormal {self.prompt_mean_tokens:g}/{self.output_mean_tokens:g} tokens"


def _clipped_mean(mu: float, sigma: float, most: float) -> float:
    """Mean of a lognormal clipped to [1, most]: P(X < 1) + E[X; 1 <= X < most] + most P(X >= most)."""

    def below(x: float) -> float:
        return 0.5 * math.erfc((mu - math.log(x)) / (sigma * math.sqrt(2)))

    def part(x: float) -> float:
        return 0.5 * math.exp(mu + sigma**2 / 2) * math.erfc((mu + sigma**2 - math.log(x)) / (sigma * math.sqrt(2)))

    return below(1.0) + part(most) - part(1.0) + most * (1.0 - below(most))


def _location(mean: float, sigma: float, most: float) -> float:
    """The mu at which ``_clipped_mean`` is ``mean``, by bisection of a monotone function."""
    low, high = -10 * sigma, math.log(most) + 10 * sigma
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _clipped_mean(middle, sigma, most) < mean else (low, middle)
    return (low + high) / 2


class Empirical(Frozen):
    """Lengths of a CSV file with columns prompt_tokens, output_tokens; other columns are ignored.

    Rows are drawn with replacement, or with ``repeat: true`` taken in the file's order, over and over. A relative path
    starts from the scenario's folder.
    """

    kind: Literal["empirical"] = "empirical"
    path: str = Field(min_length=1, description="CSV file with columns prompt_tokens, output_tokens")
    repeat: bool = Field(False, description="take the rows in order, over and over, instead of drawing them")

    def pairs(self, rng: np.random.Generator, base_dir: Path) -> Pairs:
        prompts, outputs = array("q"), array("q")
        for prompt_tokens, output_tokens in read_lengths(self.path, base_dir):
            prompts.append(prompt_tokens)
            outputs.append(output_tokens)
        if self.repeat:
            return cycle(zip(prompts, outputs, strict=True))
        both = np.column_stack([np.frombuffer(prompts, np.int64), np.frombuffer(outputs, np.int64)])
        return _pairs(lambda: both[rng.integers(0, len(both), CHUNK)])

    def describe(self) -> str:
        return f"lengths of {Path(self.path).name} {'in order' if self.repeat else 'drawn at random'}"


Lengths = Annotated[Fixed | Uniform | Lognormal | Empirical, Field(discriminator="kind")]
