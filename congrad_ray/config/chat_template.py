"""What recipe and tokenizer both have to know of chat templates."""

from __future__ import annotations

# The date that chat templates that ask for today get, unless a recipe says otherwise: what Llama 3's fall back to.
CHAT_TEMPLATE_DATE = "2024-07-26"


def is_jinja(template: str) -> bool:
    """Whether this is the text of a chat template, and not a name or a path."""
    return "{{" in template or "{%" in template
