"""A model behind an HTTP interface, as a section of a recipe."""

from __future__ import annotations

from pydantic import Field

from congrad_ray.config.fields import Positive
from congrad_ray.config.settings import Settings


class Endpoint(Settings):
    """A server with OpenAI's chat completions: OpenAI's own, vLLM's, or another of that kind."""

    url: str = Field(min_length=1, description="up to /v1, such as https://api.openai.com/v1")
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
