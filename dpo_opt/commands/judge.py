"""Rank sampled completions, as data for precompute.

The judge is a Python function, a reward model, or a chat model that compares two completions in both orders:
one in this process, or one behind an OpenAI-compatible server.
"""

from pathlib import Path
from typing import Literal, Self

import click
from pydantic import Field, PositiveInt, model_validator

from dpo_opt.console import watched
from dpo_opt.options import configured, dry_run_option, json_option
from dpo_opt.results import show
from dpo_opt.schemas.settings import Settings

_OF_THE_ENDPOINT = {"key_variable", "concurrency", "requests_per_minute", "request_option"}
_OF_A_COMPARISON = {"criteria", "max_new_tokens"}
_READ_BY = {
    "--function": set[str](),
    "--reward-model": {"dtype"},
    "--judge-model": {*_OF_A_COMPARISON, "backend", "dtype", "engine_option"},
    "--endpoint": {*_OF_A_COMPARISON, *_OF_THE_ENDPOINT},
}
"""Which settings a judge reads, beside those that every judge reads."""


class JudgeConfig(Settings):
    """Completions made into ranked completions."""

    samples: list[Path] = Field(min_length=1)
    """Folder of completions (dpo-opt sample). Repeat it to judge those of several models together."""
    output: Path
    """Folder for the answers and ranked.jsonl. The same command again continues where it stopped."""
    function: str | None = None
    """Judge: a Python function FILE.py:NAME that takes prompts and completions, and returns numbers."""
    reward_model: str | None = None
    """Judge: a reward model (sequence classification with one label): a folder, or a Hub name."""
    judge_model: str | None = None
    """Judge: a chat model that compares two completions: a folder, a Hub name, or its name at --endpoint."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server that runs --judge-model, such as http://localhost:8000/v1."""
    key_variable: str | None = None
    """endpoint: name of the environment variable that holds the key. The key itself is never an option."""
    criteria: str = "The better answer does what was asked, is correct and honest, and is clear."
    """judge-model: what makes a completion better, in a sentence."""
    max_new_tokens: PositiveInt = 512
    """judge-model: longest answer."""
    concurrency: PositiveInt = 16
    """endpoint: most requests in flight."""
    requests_per_minute: PositiveInt | None = None
    """endpoint: most requests in a minute. Default: no limit."""
    request_option: dict[str, str] = Field(default={})
    """endpoint: a field of each request, such as seed=1, in JSON or as text. null leaves a field out."""
    finished_only: bool = False
    """Leave out completions that the token limit cut off."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    """judge-model: engine. auto: vLLM if it is installed, else hf (transformers)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """reward-model, judge-model: dtype of the model. auto: the dtype that its checkpoint declares."""
    engine_option: list[str] = Field(default=[])
    """judge-model: an argument of vLLM's engine. Repeat it for each argument."""

    @property
    def judge(self) -> str:
        """The option that names who judges."""
        judges = {
            "--function": self.function,
            "--reward-model": self.reward_model,
            "--judge-model": self.judge_model,
        }
        given = [option for option, value in judges.items() if value is not None]
        if len(given) != 1:
            found = "none is given" if not given else f"{' and '.join(given)} are given"
            raise ValueError(f"one of {', '.join(judges)} is needed, and {found}")
        return "--endpoint" if given == ["--judge-model"] and self.endpoint is not None else given[0]

    @model_validator(mode="after")
    def _refuse_unread(self) -> Self:
        read = _READ_BY[self.judge]
        for name in sorted(set().union(*_READ_BY.values()) - read):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with {self.judge}: leave it out")
        if self.endpoint is not None and self.judge != "--endpoint":
            raise ValueError(f"--endpoint has no effect with {self.judge}: leave it out")
        return self


@click.command(help=__doc__)
@configured(JudgeConfig)
@dry_run_option
@json_option
def command(config: JudgeConfig, dry_run: bool, as_json: bool) -> None:
    from dpo_opt.judge import judge, plan_judge
    from dpo_opt.preemption import preemptible, same_command

    if dry_run:
        show(plan_judge(config), as_json)
        return
    with preemptible(same_command(), kept="every answer is kept"):
        show(judge(config, progress=watched()), as_json)
