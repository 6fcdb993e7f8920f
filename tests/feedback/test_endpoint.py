"""A judge behind an OpenAI-compatible server: what it is asked, how often, and where the key never is."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fakes import write_jsonl

from dpo_opt.cli import main
from dpo_opt.feedback.judging.endpoint import Endpoint
from dpo_opt.feedback.judging.questions import Answer, Question
from dpo_opt.schemas.errors import ConfigError, DpoOptError, Preempted

pytest.importorskip("openai", reason="openai is not installed: pip install 'dpo-opt[judge]'")

KEY = "sk-secret-0123456789"
Reply = tuple[int, dict[str, Any]]
QUESTIONS = [Question(str(n), [{"role": "user", "content": f"question {n}"}]) for n in range(12)]


def said(text: str) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "served", "usage": usage}
    return 200, {**answer, "choices": [choice]}


class Server(ThreadingHTTPServer):
    """Answers by a script, and remembers what it was asked.

    Args:
        reply: Gets the number of the request and its body.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self) -> Counter[str]:
        return Counter(body["messages"][-1]["content"] for body in self.bodies)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            number = len(server.bodies)
        status, answer = server.reply(number, body)
        with server.lock:
            server.in_flight -= 1
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Server]:
    with Server(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server: Server, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Answer]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    given = {"concurrency": 4, "requests_per_minute": None, "fields": {"temperature": 0}, **settings}
    endpoint = Endpoint(server.url, model="judge", key_variable="JUDGE_KEY", **given)
    answers: dict[str, Answer] = {}
    try:
        endpoint(QUESTIONS, lambda question, answer: answers.update({question.key: answer}))
    except DpoOptError as error:
        error.answers = answers  # type: ignore[attr-defined]
        raise
    return answers


def test_every_question_is_asked_once_with_few_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.02)
        return said("re " + body["messages"][0]["content"])

    with serving(reply) as server:
        answers = asked(server, monkeypatch)
    assert {key: answer.text for key, answer in answers.items()} == {
        str(n): f"re question {n}" for n in range(12)
    }
    assert answers["3"] == Answer("re question 3", "stop", "served", 5, 2)
    assert set(server.asked.values()) == {1}
    assert server.most_in_flight == 4
    assert server.keys == {f"Bearer {KEY}"}
    assert server.bodies[0].keys() == {"model", "messages", "temperature"}
    assert server.bodies[0]["model"] == "judge"


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: tuple[Reply, ...] = ((429, {"error": "slow down"}), (503, {}), (500, {}))
    with serving(lambda number, body: busy[number - 1] if number <= 3 else said("ok")) as server:
        answers = asked(server, monkeypatch)
    assert len(answers) == 12
    assert len(server.bodies) == 15


def test_no_more_than_so_many_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda number, body: said("ok")) as server:
        begin = time.monotonic()
        asked(server, monkeypatch, requests_per_minute=1200)
    assert time.monotonic() - begin > 11 * 60 / 1200


def test_a_refused_key_is_explained_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving(lambda number, body: (401, {"error": {"message": f"wrong key {KEY}"}})) as server,
        pytest.raises(DpoOptError) as caught,
    ):
        asked(server, monkeypatch)
    assert "wrong key [key]" in str(caught.value)
    assert "--key-variable" in str(caught.value)
    assert KEY not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert len(server.bodies) <= 4


def test_a_key_that_a_server_repeats_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda number, body: said(f"your key is {KEY} \ud800")) as server:
        answers = asked(server, monkeypatch)
    assert {answer.text for answer in answers.values()} == {"your key is [key] ?"}


@pytest.mark.parametrize("tokens", ["many", 3.5, -1, 2**70, None])
def test_a_number_of_tokens_that_is_none_is_left_out(monkeypatch: pytest.MonkeyPatch, tokens: object) -> None:
    status, answer = said("ok")
    answer["usage"] = {"prompt_tokens": tokens, "completion_tokens": 2, "total_tokens": 7}
    with serving(lambda number, body: (status, answer)) as server:
        answers = asked(server, monkeypatch)
    assert {(a.prompt_tokens, a.completion_tokens) for a in answers.values()} == {(None, 2)}


@pytest.mark.parametrize(
    ("reply", "fix"),
    [
        ((404, {"error": {"message": "no such model"}}), "/models"),
        ((400, {"error": {"message": "temperature is not supported"}}), "temperature=null"),
        ((200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}), "log"),
        ((200, {}), "log"),
    ],
)
def test_what_a_server_refuses_or_garbles_ends_with_what_was_answered(
    monkeypatch: pytest.MonkeyPatch, reply: Reply, fix: str
) -> None:
    with (
        serving(lambda number, body: said("ok") if number <= 5 else reply) as server,
        pytest.raises(DpoOptError) as caught,
    ):
        asked(server, monkeypatch, concurrency=1)
    assert fix in str(caught.value.fix)
    assert len(caught.value.answers) == 5  # type: ignore[attr-defined]
    assert len(server.bodies) == 6


def test_a_server_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_opt.feedback.judging.endpoint._RETRIES", 0)
    with serving(lambda number, body: said("ok")) as server:
        pass
    with pytest.raises(DpoOptError, match="did not answer") as caught:
        asked(server, monkeypatch)
    assert "start the server" in str(caught.value.fix)


def test_a_signal_waits_for_the_answers_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are paid for: what the server was asked is what is kept."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return said("ok")

    before = signal.getsignal(signal.SIGTERM)
    with serving(reply) as server, pytest.raises(Preempted, match="SIGTERM") as caught:
        asked(server, monkeypatch)
    kept = caught.value.answers  # type: ignore[attr-defined]
    assert server.asked == Counter(f"question {key}" for key in kept)
    assert 6 <= len(kept) <= 9
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("url", "variable", "said"),
    [
        ("localhost:8000", None, "no URL of a server"),
        ("ftp://host/v1", None, "no URL of a server"),
        (f"https://me:{KEY}@host/v1", None, "more than an address"),
        (f"https://host/v1?key={KEY}", None, "more than an address"),
        ("http://host/v1", "NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(
    url: str, variable: str | None, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url, model="m", key_variable=variable, concurrency=1, requests_per_minute=None, fields={})
    assert said in str(caught.value)
    assert KEY not in str(caught.value)


def holding(folder: Path, secret: str) -> list[str]:
    """Files in which a text stands, compressed tables read."""
    import pyarrow.parquet as pq

    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".parquet":
            text += str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata)
        if secret in text:
            found.append(path.name)
    return sorted(found)


def test_the_command_judges_resumes_and_leaves_no_key(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"the {word}"} for word in ("sea", "hill")])
    settings = ["--backend", "hf", "--max-new-tokens", "6", "--num-samples", "3"]
    samples, output = str(tmp_path / "samples"), tmp_path / "judged"
    words = ["sample", "--model", str(tiny_model), "--prompts", str(prompts), "--output", samples, *settings]
    assert CliRunner().invoke(main, words).exit_code == 0
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def reply(number: int, body: dict[str, Any]) -> Reply:
        if number == 5:
            return 401, {"error": {"message": KEY}}
        return said("[[A]]" if number % 2 else f"{KEY}?")

    with serving(reply) as server:
        judge = ["judge", "--samples", samples, "--output", str(output), "--judge-model", "m"]
        judge += ["--endpoint", server.url, "--key-variable", "JUDGE_KEY", "--concurrency", "1"]
        planned = CliRunner().invoke(main, [*judge, "--dry-run", "--json"])
        assert json.loads(planned.stdout)["questions"] == 12
        assert not output.exists()
        assert server.bodies == []
        stopped = CliRunner().invoke(main, judge)
        assert stopped.exit_code == 1
        assert len((output / "answers.jsonl").read_text().splitlines()) == 4
        finished = CliRunner().invoke(main, judge)
        assert finished.exit_code == 3, finished.output  # no pair has two readable answers
    result = json.loads((output / "summary.json").read_text())
    assert (result["asked"], result["asked_before"]) == (8, 4)
    assert len(server.bodies) == 13
    assert set(server.asked.values()) == {1, 2}  # the one that was refused
    assert result["malformed_answers"] == 6
    assert KEY not in stopped.output + finished.output + planned.output
    assert holding(output, KEY) == []
    assert holding(output, "[key]?") == ["answers.parquet"]  # so it would be found
    other = CliRunner().invoke(main, [*judge, "--criteria", "Shorter is better."])
    assert other.exit_code == 4
    assert "criteria" in other.output
