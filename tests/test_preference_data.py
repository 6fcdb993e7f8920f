"""The example on human-labelled pairs: what it refuses before it trains, and which prompts it completes."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from example_scripts import scripts_of

from dpo_opt.schemas.errors import ConfigError, DpoOptError

EXAMPLE = Path(__file__).parents[1] / "examples" / "preference_data"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    with scripts_of(EXAMPLE) as imported:
        yield imported


def work_in(example: Callable[[str], ModuleType], folder: Path, **changed: Any) -> Any:
    size = example("settings").read_size("tiny")
    return example("folders").Work(size.model_copy(update=changed), folder, "model")


def test_a_judge_that_could_not_begin_is_refused_before_anything_is_trained(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    require = example("run").require_judge
    (tmp_path / "judge.py").write_text("def longer(prompts, texts):\n    return map(len, texts)\n")
    require(("--function", f"{tmp_path / 'judge.py'}:longer"))
    require(("--judge-model", "NAME", "--endpoint", "https://HOST/v1", "--concurrency", "4"))
    with pytest.raises(ConfigError, match="no function shorter"):
        require(("--function", f"{tmp_path / 'judge.py'}:shorter"))
    with pytest.raises(click.UsageError, match="--judge-modl"):
        require(("--judge-modl", "NAME"))


class Refuses(http.server.BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_judge_that_cannot_compare_is_known_before_anything_is_trained(
    example: Callable[[str], ModuleType], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    work, try_judge = work_in(example, tmp_path / "new"), example("win_rates").try_judge
    file = tmp_path / "judge.py"
    file.write_text("def longer(prompts, texts):\n    return [float(len(text)) for text in texts]\n")
    try_judge(work, ("--function", f"{file}:longer"))
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wrong = ("--judge-model", "NAME", "--endpoint", f"http://127.0.0.1:{server.server_port}/v1")
        with pytest.raises(DpoOptError, match="`dpo-opt judge` ended with exit code 1"):
            try_judge(work, wrong)
        server.shutdown()
    assert "--key-variable" in capfd.readouterr().err
    assert not work.folder.exists()
    assert work.judged(wrong) != work.judged(("--function", f"{file}:longer"))
    done = work.judged(wrong) / "policy-1" / "summary.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    try_judge(work, wrong)  # what it judged already is not asked again


def test_a_folder_without_a_finished_step_is_begun_again(
    example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    begin, work = example("folders").begin, work_in(example, tmp_path / "new")
    begin(work, {"data": "pears.jsonl"})
    begin(work, {"data": "pairs.jsonl"})
    (work.folder / "pairs").mkdir()
    begin(work, {"data": "pairs.jsonl"})
    with pytest.raises(ConfigError, match="begun otherwise"):
        begin(work, {"data": "pears.jsonl"})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="a file, not a folder"):
        begin(work._replace(folder=tmp_path / "file"), {})


def test_prompts_keep_their_tools_and_have_a_chosen_completion_of_text(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def messages(*contents: str | None) -> list[dict[str, object]]:
        return [{"role": "assistant", "content": content} for content in contents]

    rows = [
        {"prompt": "text", "chosen": "a", "rejected": "b", "source": "here"},
        {
            "prompt": "one message",
            "chosen": messages("a"),
            "rejected": messages("b"),
            "tools": [{"name": "t"}],
        },
        {"prompt": "several", "chosen": messages("a", "b"), "rejected": messages("c")},
        {"prompt": "a call", "chosen": messages(None), "rejected": messages("c")},
    ]
    run = example("run")
    monkeypatch.setattr(run, "dpo_opt", lambda *words: None)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = work_in(example, tmp_path, num_prompts=2)
    run.prepare(work, "data", ())
    kept = [json.loads(line) for line in work.prompts.read_text(encoding="utf-8").splitlines()]
    assert kept == [{k: v for k, v in row.items() if k != "source"} for row in rows[:2]]
    with pytest.raises(ConfigError, match=r"2 prompts .* 3 are to be completed"):
        run.prepare(work_in(example, tmp_path, num_prompts=3), "data", ())
