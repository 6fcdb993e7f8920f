"""Rows of one completion and a label that says whether it is desirable, as KTO learns from.

======================  ====================================================================  ===============
form                    keys                                                                  found in
======================  ====================================================================  ===============
unpaired                prompt, completion, label                                             TRL
labelled conversations  messages or conversations, label or kto_tag; the last turn answers    ms-swift,
                                                                                              LLaMA-Factory
Alpaca feedback         instruction, input, output, system, history, label or kto_tag         LLaMA-Factory
======================  ====================================================================  ===============

The completion stands as ``chosen`` and as ``rejected``, beside ``label``.
"""

from dpo_opt.precompute.read.framework_shapes import alpaca, conversation_of, sharegpt_tools
from dpo_opt.precompute.read.prompt_columns import refuse_media
from dpo_opt.precompute.read.shape_parts import (
    CONVERSATION_KEYS,
    LABEL_KEYS,
    MEDIA,
    PAIR_KEYS,
    Shape,
    Values,
    agreed,
    kept,
    refuse,
    refuse_label,
)

_WORDS = {"true": True, "1": True, "false": False, "0": False}


def _labelled(values: Values, row: Values, completion: object, where: str) -> list[Values]:
    """The row with its completion on both sides, and its label.

    Raises:
        DataError: The label is neither true nor false, or two keys say different ones.
    """
    given = {key: _truth(key, values[key], where) for key in LABEL_KEYS if values.get(key) is not None}
    label = agreed(given, where)
    if label is None:
        _truth(next(key for key in LABEL_KEYS if key in values), None, where)
    return [{**row, "chosen": completion, "rejected": completion, "label": label}]


def _truth(key: str, label: object, where: str) -> bool:
    if isinstance(label, str):
        label = _WORDS.get(label.strip().lower(), label)
    if isinstance(label, int | float) and label in (0, 1):
        return bool(label)
    refuse_label(key, label, where, expected="true (desirable) or false (undesirable)")


def _completion(values: Values, where: str) -> list[Values]:
    row = {**kept(values), "prompt": values["prompt"]}
    return _labelled(values, row, values["completion"], where)


def _conversation(values: Values, where: str) -> list[Values]:
    refuse_media(values, where)
    key, turns = conversation_of(values, where)
    last = turns[-1] if len(turns) > 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        refuse(f'"{key}" is no conversation that ends with an answer of the assistant', where)
    row = {**kept(values), **sharegpt_tools(values, where), "prompt": turns[:-1]}
    return _labelled(values, row, [last], where)


def _alpaca_feedback(values: Values, where: str) -> list[Values]:
    output = values["output"]
    (row,) = alpaca({**values, "chosen": output, "rejected": output}, where)
    return _labelled(values, row, row["chosen"], where)


UNPAIRED_SHAPES = (
    Shape(
        "unpaired",
        frozenset({"prompt", "completion", "label"}),
        _completion,
        absent=PAIR_KEYS,
        unpaired=True,
    ),
    *(
        Shape(
            "labelled conversations",
            frozenset({key, label}),
            _conversation,
            absent=PAIR_KEYS | {"completion", "output"},
            also=frozenset({*MEDIA, *CONVERSATION_KEYS, *LABEL_KEYS}),
            unpaired=True,
        )
        for key in CONVERSATION_KEYS
        for label in LABEL_KEYS
    ),
    *(
        Shape(
            "Alpaca feedback",
            frozenset({"instruction", "output", label}),
            _alpaca_feedback,
            absent=PAIR_KEYS | {"prompt"},
            also=frozenset({*MEDIA, *LABEL_KEYS, "input", "system", "history"}),
            unpaired=True,
        )
        for label in LABEL_KEYS
    ),
)
