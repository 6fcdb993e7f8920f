"""The prompt of a row that has no key of it: what both completions begin with, by one of three rules.

* Human/Assistant transcripts (both begin with ``\\n\\nHuman:`` and contain ``\\n\\nAssistant:``): everything
  up to and including the last ``\\n\\nAssistant:`` before the transcripts differ.
* Other text: the longest common prefix in characters, less a space at its end, so that the completions
  begin with that space; where one side is the beginning of the other, all but its last character. This is
  TRL's rule, which also splits transcripts and so gives words that two answers happen to share to the prompt.
* Messages: the longest common prefix in messages, always leaving at least one to either side (TRL's rule).
"""

from typing import cast

from dpo_opt.precompute.read.messages import ASKING_ROLES
from dpo_opt.schemas.errors import DataError
from dpo_opt.schemas.pairs import Message, Text

_HUMAN = "\n\nHuman:"
_ASSISTANT = "\n\nAssistant:"


def split_prompt(chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a row whose completions contain the prompt.

    Raises:
        DataError: They begin differently.
    """
    shared = common_prefix_length(chosen, rejected)
    shortest = min(len(chosen), len(rejected))
    if isinstance(chosen, str) and is_transcript(chosen) and is_transcript(cast(str, rejected)):
        turn = chosen.rfind(_ASSISTANT, 0, shared)
        cut = turn + len(_ASSISTANT) if turn >= 0 else 0
    elif shared == shortest:
        cut = shortest - 1
    else:
        cut = shared - 1 if shared and chosen[shared - 1] == " " else shared
    if cut == 0:
        raise DataError(
            'there is no "prompt", and "chosen" and "rejected" begin differently',
            where=where,
            why="without a common beginning nothing says what the completions answer",
            fix='add the key "prompt", or remove the row',
            kind="no_common_prompt",
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def answered(asked: list[Message], chosen: list[Message], rejected: list[Message]) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of answers to what was asked; turns that both begin with are prompt too.

    What is left to either side begins with an answer, and is at least one message.
    """
    shared = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while shared and {chosen[shared].get("role"), rejected[shared].get("role")} & ASKING_ROLES:
        shared -= 1
    return [*asked, *chosen[:shared]], chosen[shared:], rejected[shared:]


def is_transcript(text: str) -> bool:
    """Whether a text is turns of Human and Assistant."""
    return text.startswith(_HUMAN) and _ASSISTANT in text


def common_prefix_length(a: Text, b: Text) -> int:
    """How many characters, or messages, two texts begin with in common."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    # By halves: comparing slices is far quicker than comparing characters one by one.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
