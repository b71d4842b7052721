"""A reward model as a judge: a sequence classifier with one label reads prompt and response; it writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.config.fields import batch_tokens
from congrad_ray.config.printable import brief, printable
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, failure, table_of
from congrad_ray.modeling.source import ModelError, ModelSource
from congrad_ray.modeling.tokenization import MissingChatTemplate, chat_ids
from congrad_ray.runtime.attempts import attempt, killed_worker
from congrad_ray.runtime.notices import Notify
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def load_reward_model(source: ModelSource, device: str, devices: int = 1) -> PreTrainedModel:
    """The sequence classifier in the source's dtype on `device` ('meta': without its weights), for evaluation.

    With several `devices` its layers are spread over those of this process. Raises ModelError naming the labels
    where there is not exactly one, and the first weight that is in no file: a head that is missing would be random
    numbers without more than a warning.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path, arguments = source.local_path(), source.pretrained_arguments()
    placed = "balanced" if devices > 1 else {"": device}
    try:
        config = AutoConfig.from_pretrained(path, **arguments)
        if (labels := config.num_labels) == 1:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=getattr(torch, source.settings.dtype),
                use_safetensors=True,
                output_loading_info=True,
                device_map=placed,
                **arguments,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # broken files end in whatever the library's readers raise
        raise ModelError(
            f"cannot load the reward model {brief(path)}: {type(error).__name__}: "
            f"{printable(' '.join(str(error).split()))}; judge.method reward_model needs a checkpoint for "
            "sequence classification, as AutoModelForSequenceClassification's save_pretrained writes it"
        ) from error
    if labels != 1:
        names = ", ".join(str(name) for name in (config.id2label or {}).values())
        raise ModelError(
            f"the reward model {brief(path)} has {labels} labels ({printable(names)}), and a score is one number: "
            "take a checkpoint with num_labels 1"
        )
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ModelError(
            f"{brief(path)} is no reward model: the weight {printable(missing[0])} is in none of its files and "
            "would be random; take a checkpoint for sequence classification with its head"
        )
    model: PreTrainedModel = loaded[0]
    return model.eval()


def token_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Prompt and response by the model's own chat template. Raises ValueError where it cannot render them."""
    return chat_ids(tokenizer, [*row["prompt"], {"role": "assistant", "content": row["response"]}])


def rewards(model: PreTrainedModel, sequences: Sequence[Sequence[int]], max_tokens: int) -> list[float]:
    """The logit of every sequence of token ids, in batches of at most `max_tokens` padded tokens."""
    import torch

    from congrad_ray.modeling.batching import token_budget_batches

    config: Any = model.config.get_text_config()
    own_padding = config.pad_token_id
    found = [math.nan] * len(sequences)
    for members in token_budget_batches([len(ids) for ids in sequences], max_tokens):
        rows = [sequences[member] for member in members]
        width = max(len(ids) for ids in rows)
        # The classifier reads the last token that is not this one. Where the model has none, one that is in no
        # row: the last token of each is read, as it would be without padding.
        padding = own_padding if own_padding is not None else _absent(rows)
        config.pad_token_id = padding
        ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = torch.arange(width, device=model.device) < lengths[:, None]
        with torch.no_grad():
            logits: Any = model(input_ids=ids, attention_mask=mask.long()).logits
        for member, value in zip(members, logits[:, 0].float().tolist(), strict=True):
            found[member] = value
    config.pad_token_id = own_padding
    return found


def _absent(rows: Sequence[Sequence[int]]) -> int:
    """The least token id that is in no row."""
    there = {token for row in rows for token in row}
    return next(token for token in range(len(there) + 1) if token not in there)


class RewardModel:
    """An actor of Ray Data's: rows of requests to rows of JUDGEMENT_SAMPLES and FAILURE."""

    def __init__(
        self,
        source: ModelSource,
        device: str,
        devices: int,
        threads: int,
        length_setting: str,
        attempts: Any,
        notify: Notify,
    ) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(threads)
        notify(f"loading the reward model {source.name}")
        self._max_tokens = batch_tokens(None, device)
        self._length, self._length_setting = source.settings.max_length, length_setting
        self._tokenizer = source.load_tokenizer()
        self._model = load_reward_model(source, device, devices)
        self._attempts, self._notify = attempts, notify

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Scores a batch; rows that repeatedly kill their actor, or are too long, have a failure."""
        rows = batch.to_pylist()
        empty = dict.fromkeys(JUDGEMENT_SAMPLES.names)
        found: list[Row] = [{**empty, **row, FAILURE: None} for row in rows]

        def score(places: list[int]) -> None:
            usable: dict[int, list[int]] = {}
            for place in places:
                try:
                    ids = token_ids(self._tokenizer, rows[place])
                except MissingChatTemplate:
                    raise
                except Exception as error:  # a template may raise anything
                    found[place][FAILURE] = failure("bad_request", f"{type(error).__name__}: {error}")
                    continue
                found[place] |= {"prompt_tokens": len(ids), "output_tokens": 0}
                if len(ids) > self._length:
                    detail = f"{len(ids)} tokens > {self._length_setting} {self._length}"
                    found[place][FAILURE] = failure("prompt_too_long", detail)
                else:
                    usable[place] = ids
            values = rewards(self._model, list(usable.values()), self._max_tokens)
            for place, value in zip(usable, values, strict=True):
                if math.isfinite(value):
                    found[place]["score"] = value
                else:
                    found[place][FAILURE] = failure("not_finite", f"the logit is {value}")

        for place in attempt(self._attempts, [row["judgement_id"] for row in rows], score):
            found[place][FAILURE] = killed_worker()
        self._notify.computed(len(rows), last=True)
        nullable = [column.with_nullable(True) for column in JUDGEMENT_SAMPLES]
        return table_of(found, pa.schema([*nullable, FAILURE_FIELD]))
