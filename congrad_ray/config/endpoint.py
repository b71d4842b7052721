"""A model behind an HTTP interface, as a section of a recipe."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from congrad_ray.config.fields import Positive
from congrad_ray.config.settings import Settings


def _plain_url(url: str) -> str:
    """A URL is written to recipe.yaml and to logs, so there may be no key in it."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises where it is none
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL as in https://api.openai.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "must have no user, password or query: a key belongs in the variable that api_key_env names"
        )
    return url


class Endpoint(Settings):
    """A server with OpenAI's chat completions: OpenAI's own, vLLM's, or another of that kind."""

    url: Annotated[str, AfterValidator(_plain_url)] = Field(
        min_length=1, description="up to /v1, such as https://api.openai.com/v1"
    )
    model: str = Field(min_length=1, description="the server's name for the model")
    api_key_env: str | None = Field(
        None, description="environment variable that holds the key; the key itself is written nowhere"
    )
    requests_per_minute: Positive | None = Field(None, description="at most; null: as many as are answered")
    max_concurrency: Positive = Field(16, description="requests that wait for an answer at once")
    max_retries: int = Field(5, ge=0, description="of a request that was refused for now or not answered")
    timeout_s: float = Field(120.0, gt=0, description="seconds to wait for one answer")
    input_price: float | None = Field(None, ge=0, description="US dollars for a million tokens read")
    output_price: float | None = Field(None, ge=0, description="US dollars for a million tokens written")

    def dollars(self, read: float, written: float) -> float | None:
        """What so many tokens cost; None without a price."""
        if self.input_price is None and self.output_price is None:
            return None
        return ((self.input_price or 0.0) * read + (self.output_price or 0.0) * written) / 1e6
