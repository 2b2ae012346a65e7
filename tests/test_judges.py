"""Judges: what they say, what they know of themselves, and a server of our own behind one."""

import json
import random
import re
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import sae_query_steer as sqs
from sae_query_steer.compare.endpoint import ChatEndpoint, NoAnswerError
from sae_query_steer.compare.held_out import judge_sentence, may_guess
from sae_query_steer.compare.judges import ClassifierJudge, Judge, LanguageModelJudge, RuleJudge

VERBS = {
    "remember": ["list", "name", "recall", "define"],
    "apply": ["use", "solve", "compute", "demonstrate"],
    "create": ["design", "invent", "compose", "plan"],
}
NOUNS = ["roots", "harbors", "metals", "clouds", "rivers", "engines", "maps", "songs"]


def labelled(label: str, response: str, prompt: str = "Teacher:") -> sqs.LabelledExample:
    return sqs.LabelledExample(prompt=prompt, response=response, label=label)


def corpus(per_class: int = 24) -> list[sqs.LabelledExample]:
    """Responses of three classes that differ in their verbs, which no other class has."""
    return [
        labelled(name, f" Please {verbs[i % 4]} the {NOUNS[i % 8]} and the {NOUNS[i // 3 % 8]}.")
        for i in range(per_class)
        for name, verbs in VERBS.items()
    ]


def says(answers: dict[str, str]) -> LanguageModelJudge:
    """A judge whose model gives a set answer to each text."""
    return LanguageModelJudge(lambda text: answers[text], ["apply", "create"], "{text}")


JUDGES = {
    "classifier": lambda: ClassifierJudge.fit(corpus()),
    "rule": lambda: RuleJudge(lambda _, text: "create" if "design" in text else None, ["create"]),
    "model": lambda: LanguageModelJudge(lambda _: "create", ["apply", "create"]),
}


# --- what all judges share


@pytest.mark.parametrize("kind", JUDGES)
def test_every_judge_keeps_the_interface(kind):
    judge = JUDGES[kind]()
    assert isinstance(judge, Judge)
    assert judge([], []) == []
    assert judge(["p"], ["Please design the roots."]) == ["create"]
    assert "create" in judge.classes
    assert not isinstance(lambda prompts, texts: [], Judge)


# --- the classifier


def test_the_classifier_tells_classes_it_learned_in_texts_it_did_not_see():
    judge = ClassifierJudge.fit(corpus())
    assert judge.classes == ("remember", "apply", "create")  # Bloom's order
    texts = ["Now invent new ships!", "RECALL ships.", "Solve ships", "Designing a ship"]
    assert judge([""] * 4, texts) == ["create", "remember", "apply", "create"]
    assert judge.held_out == {
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,
        "answered": 1.0,
        "n": 18.0,
        "chance": pytest.approx(1 / 3),
        "majority": pytest.approx(1 / 3),
    }


def test_a_text_with_nothing_that_it_learned_from_has_no_class():
    judge = ClassifierJudge.fit(corpus())
    assert judge([""] * 3, ["", " \n", "日本"]) == [None, None, None]


def test_labels_that_say_nothing_give_a_held_out_accuracy_about_chance():
    """The held-out texts are really held out: the judge knows its own by heart."""
    texts = [f"{a} {b} {c}" for a in NOUNS for b in NOUNS for c in NOUNS[:4]]
    examples = [labelled("ab"[hash_of(text) % 2], text) for text in texts]
    judge = ClassifierJudge.fit(examples)
    assert judge.held_out["n"] == pytest.approx(64, abs=1)
    assert 0.35 < judge.held_out["accuracy"] < 0.65
    own = judge(texts, texts)
    assert sum(a == e.label for a, e in zip(own, examples, strict=True)) > 0.7 * len(texts)


def hash_of(text: str) -> int:
    """A number that is the same in every process, unlike Python's hash."""
    return zlib.crc32(text.encode()) >> 7


def test_a_response_that_occurs_twice_is_not_on_both_sides():
    """With copies on both sides, nonsense labels would seem to be told."""
    texts = [f"{a} {b} {c}" for a in NOUNS for b in NOUNS for c in NOUNS[:2]]
    examples = [labelled("ab"[hash_of(text) % 2], text) for text in texts]
    once, copied = ClassifierJudge.fit(examples), ClassifierJudge.fit(examples * 5)
    assert copied.held_out == once.held_out
    assert copied.held_out["accuracy"] < 0.7


def test_the_seed_decides_what_is_held_out_and_nothing_else_does():
    texts = [f"{a} {b}" for a in NOUNS for b in NOUNS]
    examples = [labelled("ab"[hash_of(text) % 2], text) for text in texts]
    found = [ClassifierJudge.fit(examples, seed=seed).held_out for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_classes_of_different_sizes_are_balanced_in_the_second_score_alone():
    # Eight texts that read like those of another class, which has three times as many.
    hard = [labelled("few", f"Please {VERBS['apply'][i % 4]} the {NOUNS[-i]}.") for i in range(8)]
    judge = ClassifierJudge.fit(corpus(40) + hard, seed=1)
    assert judge.held_out["balanced_accuracy"] < judge.held_out["accuracy"] < 1
    assert judge.held_out["chance"] == 0.25
    assert judge.held_out["majority"] > 0.25


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "examples for a judge must be one or more"),
        (corpus()[::3], "the labels name 1 class(es), ['remember']: a target needs at least"),
        (
            [*corpus(), *[labelled("new", f"a {i % 3}") for i in range(9)]],
            "class 'new' has 3 example(s), fewer than at_least=4: add examples of it, or leave",
        ),
        (
            [*corpus(), labelled("create", "  ", prompt="Design a bridge")],
            "got 73, of which 1 without a response (the first: [72])",
        ),
    ],
)
def test_examples_that_teach_nothing_are_refused(examples, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassifierJudge.fit(examples)


# --- what its accuracy is worth


@pytest.mark.parametrize(
    ("accuracy", "n", "majority", "guessing"),
    [
        (1 / 3, 6, 1 / 3, True),
        (0.5, 24, 1 / 3, True),  # Wilson: 0.314 and up
        (0.5, 60, 1 / 3, False),  # 0.377 and up
        (0.5, 60, 0.5, True),  # no better than the name of the most frequent class
        (1.0, 6, 1 / 3, False),
    ],
)
def test_a_judge_may_be_guessing_where_its_interval_reaches_chance(accuracy, n, majority, guessing):
    held_out = {"accuracy": accuracy, "n": n, "chance": 1 / 3, "majority": majority}
    assert may_guess(held_out) is guessing
    said = judge_sentence(held_out)
    assert said.startswith(f"Judge: accuracy {accuracy:.2f} [")
    assert f"n = {n}, chance {majority:.2f}." in said
    assert ("No verdict" in said) is guessing


def test_a_judge_that_was_not_measured_is_told_how():
    assert not may_guess({})
    assert "accuracy unknown; measure it with" in judge_sentence({})


# --- the rule


def test_the_rule_gets_prompt_and_text_of_the_same_row():
    judge = RuleJudge(lambda prompt, text: "yes" if text in prompt else None, ["yes", "no"])
    assert judge(["one two", "three"], ["two", "one"]) == ["yes", None]
    assert judge.held_out == {}


def test_a_class_that_the_rule_may_not_say_is_refused_by_name():
    judge = RuleJudge(lambda _, text: text, ["a", "b"])
    message = "the rule must return None or one of ['a', 'b'], got ['c']"
    with pytest.raises(ValueError, match=re.escape(message)):
        judge(["", ""], ["a", "c"])


def test_measured_returns_a_new_judge_with_its_accuracy():
    rule = RuleJudge(lambda _, text: None if "?" in text else text.split()[0], ["a", "b"])
    texts = [("a", "a x"), ("a", "a y"), ("a", "b x"), ("a", "a z"), ("b", "b x"), ("b", "? x")]
    measured = rule.measured([labelled(label, text) for label, text in texts])
    truth, said = [label for label, _ in texts], ["a", "a", "b", "a", "b", "-"]
    assert measured.held_out["accuracy"] == accuracy_score(truth, said) == 4 / 6
    # scikit-learn's would warn of the class "-".
    assert balanced_accuracy_score(truth[:5], said[:5]) == (3 / 4 + 1) / 2
    assert measured.held_out["balanced_accuracy"] == (3 / 4 + 1 / 2) / 2
    assert measured.held_out["answered"] == 5 / 6
    assert measured.held_out["n"] == 6
    assert measured.held_out["chance"] == 0.5
    assert measured.held_out["majority"] == 4 / 6
    assert rule.held_out == {}
    assert measured.rule is rule.rule


def test_measuring_passes_prompt_and_response():
    seen = []
    rule = RuleJudge(lambda prompt, text: seen.append((prompt, text)), ["a"])
    rule.measured([labelled("a", " text", prompt="asked")])
    assert seen == [("asked", " text")]


@pytest.mark.parametrize("kind", ["rule", "model"])
@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "must be one or more with a response each, got 0"),
        ([labelled("create", "")], "got 1, of which 1 without a response"),
        ([labelled("create", "x"), labelled("evaluate", "x")], r"got \['evaluate'\]: leave such"),
    ],
)
def test_examples_that_measure_nothing_are_refused(kind, examples, message):
    with pytest.raises(ValueError, match=message):
        JUDGES[kind]().measured(examples)


# --- the language model


@pytest.mark.parametrize(
    "answer, name",
    [
        ("create", "create"),
        ("Answer: CREATE.", "create"),
        ("**Create**\n\ncreate", "create"),
        ("It is to apply", "apply"),
        ("creates", None),
        ("re-create", None),
        ("create or apply", None),
        ("remember", None),
        ("", None),
    ],
)
def test_the_answer_is_the_one_class_named_as_a_whole_word(answer, name):
    assert says({"x": answer})([""], ["x"]) == [name]


def test_the_longer_of_two_names_counts_where_one_holds_the_other():
    classes = ["toxic", "non-toxic", "very toxic", "toxic waste", "C++", "a|b"]
    parsed = LanguageModelJudge(lambda _: "", classes).parsed
    for name in classes:
        assert parsed(f"({name})") == name
    assert parsed("very\n TOXIC") == "very toxic"
    assert parsed("very toxic, not toxic") is None
    assert parsed("a or b") is None


def test_the_question_holds_the_prompt_the_text_and_the_classes_to_the_letter():
    asked = []

    def ask(question: str) -> str:
        asked.append(question)
        return "apply"

    LanguageModelJudge(ask, ["apply", "create"])(["{braces}"], ["{text} 100 %"])
    assert asked == [
        "Which of these classes does the response belong to: apply, create?\n\nPrompt: {braces}\n\n"
        "Response: {text} 100 %\n\nAnswer with the name of one class and nothing else."
    ]
    LanguageModelJudge(ask, ["apply", "create"], "{{{text}}}")(["p"], ["t"])
    assert asked[1] == "{t}"


def test_a_measured_model_knows_how_often_it_answered():
    judge = says({" a": "apply", " b": "apply", " c": "both apply and create"})
    examples = [labelled("apply", " a"), labelled("create", " b"), labelled("create", " c")]
    measured = judge.measured(examples)
    assert measured.held_out["accuracy"] == 1 / 3
    assert measured.held_out["answered"] == 2 / 3
    assert measured.held_out["balanced_accuracy"] == 0.5
    assert judge.held_out == {}


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{prompt}",
            "and may have {prompt} and {classes}, got ['prompt']",
        ),
        ("{text} {label}", "got ['label', 'text']"),
        ("{text} {", "Single '{' encountered"),
    ],
)
def test_a_template_that_can_not_be_filled_in_is_refused(template, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LanguageModelJudge(lambda _: "", ["a", "b"], template)


def test_classes_that_differ_in_case_alone_are_refused():
    with pytest.raises(ValueError, match="must differ in more than case"):
        LanguageModelJudge(lambda _: "", ["Apply", "apply"])


# --- a server of our own

KEY = "sk-a-secret-of-ours"


def completion(content: str | None) -> bytes:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**body, "choices": [choice], "usage": usage}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers`, the last one for ever; notes requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = [(200, completion("create"))]
        self.headers: dict[str, str] = {}
        self.pause = 0.0
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, json.loads(body)))
        answers = self.server.answers
        status, said = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for part in [said] if not self.server.pause else map(bytes, zip(said)):
            time.sleep(self.server.pause)
            try:
                self.wfile.write(part)
            except OSError:  # the client has left
                return

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setattr("sae_query_steer.compare.endpoint.PAUSE", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def endpoint(server: Server, **changes) -> ChatEndpoint:
    given = {"base_url": server.url, "model": "judge-7b", "api_key": KEY}
    return ChatEndpoint(**{**given, **changes})


def test_the_endpoint_asks_one_question_at_temperature_zero_with_a_fixed_seed(server):
    assert endpoint(server, seed=7, max_tokens=9)("Which class?") == "create"
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert {key: value for key, value in body.items() if key != "stream"} == {
        "model": "judge-7b",
        "messages": [{"role": "user", "content": "Which class?"}],
        "max_tokens": 9,
        "temperature": 0.0,
        "seed": 7,
    }
    assert not body.get("stream")


def test_extra_entries_are_sent_and_none_takes_one_away(server):
    extra = {"max_tokens": None, "max_completion_tokens": 500, "temperature": 1.0}
    endpoint(server, extra=extra)("?")
    [(_, _, body)] = server.requests
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["temperature"]) == (500, 1.0)


def test_nothing_of_the_environment_is_sent(server):
    endpoint(server, api_key=None)("?")
    assert "secret-OPENAI" not in str(server.requests)
    assert server.requests[0][1]["authorization"] == "Bearer none"


def test_a_redirect_is_not_followed(server):
    server.answers = [(307, b"")]
    server.headers = {"Location": "/elsewhere"}
    with pytest.raises(RuntimeError, match="status 307"):
        endpoint(server)("?")
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}


def test_an_answer_of_more_than_a_mebibyte_is_refused(server):
    server.answers = [(200, completion("x" * 2**20))]
    with pytest.raises(RuntimeError, match=f"more than {2**20} bytes"):
        endpoint(server)("?")
    server.answers = [(500, b"x" * 2**21)]
    with pytest.raises(RuntimeError, match=f"more than {2**20} bytes"):
        endpoint(server, tries=1)("?")


def test_a_reply_without_an_answer_costs_one_text_its_class_and_no_other(server):
    deep = (200, b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(NoAnswerError, match=r"no chat completion \(RecursionError\)"):
        server.answers = [deep]
        endpoint(server)("?")
    judge = LanguageModelJudge(endpoint(server), ["apply", "create"])
    server.answers = [deep, (200, completion("apply"))]
    with pytest.warns(UserWarning, match="1 of 2 texts have no class: .*no chat completion"):
        assert judge(["p", "q"], ["a", "b"]) == [None, "apply"]
    server.answers = [deep]
    with pytest.raises(NoAnswerError):
        judge(["p", "q"], ["a", "b"])
    server.answers = [(401, b""), (200, completion("apply"))]
    with pytest.raises(RuntimeError, match="status 401"):
        judge(["p", "q"], ["a", "b"])


def test_a_server_that_sends_a_byte_now_and_then_meets_the_deadline(server):
    server.pause = 0.2
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"within 0\.5 s"):
        endpoint(server, timeout=0.5)("?")
    assert time.monotonic() - start < 5


def test_nothing_is_asked_after_the_deadline(server, monkeypatch):
    assert endpoint(server)("?")  # imports the client
    monkeypatch.setattr("sae_query_steer.compare.endpoint.PAUSE", 60.0)
    server.answers = [(503, b"")]
    with pytest.raises(ConnectionError, match=r"within 0\.5 s"):
        endpoint(server, timeout=0.5)("?")
    asking = [thread for thread in threading.enumerate() if "(ask)" in thread.name]
    for thread in asking:
        thread.join(30)
    assert not any(thread.is_alive() for thread in asking)
    assert len(server.requests) <= 2


def test_a_judge_behind_a_server_judges(server):
    server.answers = [(200, completion(answer)) for answer in ("apply", "Create.", "I can't say")]
    judge = LanguageModelJudge(endpoint(server), ["apply", "create"])
    assert judge(["p", "q", "r"], ["a", "b", "c"]) == ["apply", "create", None]
    questions = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert ["Response: a" in questions[0], "Prompt: q" in questions[1]] == [True, True]


def test_a_busy_server_is_asked_again(server):
    server.answers = [(503, b""), (429, b"slow down"), (200, completion("apply"))]
    state = random.getstate()
    assert endpoint(server)("?") == "apply"
    assert len(server.requests) == 3
    assert random.getstate() == state


@pytest.mark.parametrize(
    "said",
    [
        b"broken",
        json.dumps({"error": {"message": f"broken, your key was {KEY}"}}).encode(),
        b'["broken"]',
        b'"broken"',
        b"",
    ],
)
def test_a_server_that_fails_every_time_is_named_with_its_status_and_without_the_key(server, said):
    server.answers = [(500, said)]
    with pytest.raises(RuntimeError) as caught:
        endpoint(server)("?")
    shown = "".join(traceback.format_exception(caught.value))
    assert f"{server.url} answered with status 500" in str(caught.value)
    assert ("broken" in str(caught.value)) == bool(said)
    assert KEY not in shown
    assert len(server.requests) == 3


def test_a_question_that_is_refused_is_not_asked_again(server):
    server.answers = [(401, json.dumps({"error": f"wrong: {KEY}"}).encode())]
    message = 'answered with status 401: {"error": "wrong: [key]"}'
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        endpoint(server)("?")
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "said",
    [b"not { JSON", b"[]", b"{}", b'"text"', b"3", b'{"choices": []}', b'{"error": "no model"}'],
)
def test_an_answer_that_is_no_chat_completion_is_told_apart(server, said):
    server.answers = [(200, said)]
    message = f"{server.url} answered with no chat completion"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        endpoint(server)("?")


def test_an_answer_without_text_tells_of_the_number_of_tokens(server):
    server.answers = [(200, completion(None))]
    with pytest.raises(RuntimeError, match="answered with no text: max_tokens=16 may be too few"):
        endpoint(server)("?")


def test_a_server_that_is_not_there_is_named(server, unused_port):
    url = f"http://127.0.0.1:{unused_port}/v1?secret=1"
    with pytest.raises(ConnectionError) as caught:
        endpoint(server, base_url=url)("?")
    message = f"no answer from http://127.0.0.1:{unused_port}/v1 (ConnectError)"
    assert message in str(caught.value)


@pytest.fixture
def unused_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return server.server_port


def test_the_key_is_not_shown(server):
    assert KEY not in repr(endpoint(server))
    assert KEY not in repr(LanguageModelJudge(endpoint(server), ["a", "b"]))
    assert "judge-7b" in repr(endpoint(server))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_url": "localhost:8000"}, "base_url must be the address of a server"),
        ({"base_url": "http://"}, "base_url must be the address of a server"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "without user and password"),
        ({"api_key": ""}, "api_key must be printable"),
        ({"api_key": KEY + "\n"}, "api_key must be printable"),
        ({"max_tokens": 0}, "max_tokens must be a whole number >= 1, got 0"),
        ({"tries": 0}, "tries must be a whole number >= 1, got 0"),
        ({"timeout": 0.0}, "timeout must be a finite number > 0"),
    ],
)
def test_an_endpoint_that_can_not_be_asked_is_refused(changes, message):
    given = {"base_url": "http://host/v1", "model": "m"}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ChatEndpoint(**{**given, **changes})
    assert KEY not in str(caught.value)
