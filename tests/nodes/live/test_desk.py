"""The order in which questions of pages are answered, and that nothing else of the server waits for them."""

import asyncio
import json
import threading
import types

import comfy_harness as harness
import pytest


class Slow:
    """An answer that takes until it is let go: the first one, so that what comes meanwhile waits."""

    def __init__(self):
        self.answered, self.threads, self.go = [], set(), threading.Event()

    def __call__(self, what):
        self.answered.append(what)
        self.threads.add(threading.current_thread())
        assert self.go.wait(30)
        if what == "bad":
            raise ValueError(what)
        return what.upper()


def ask_all(live, *asked, wanted=lambda what: True):
    """(answers or errors, Slow) of (asker, what) asked in this order, while "first" is under way."""
    slow = Slow()

    async def run():
        table = live.desk.Desk(slow)
        tasks = []
        for asker, what in (("somebody", "first"), *asked):
            question = table.ask(asker, what, (what,), lambda what=what: wanted(what))
            tasks.append(asyncio.ensure_future(question))
            await asyncio.sleep(0)
        slow.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *answers = asyncio.run(run())
    assert first == "FIRST" and slow.answered[0] == "first"
    return answers, slow


def test_one_at_a_time_in_a_thread_of_its_own(live):
    answers, slow = ask_all(live, ("a", "1"), ("b", "2"), ("c", "3"))
    assert answers == ["1", "2", "3"] and slow.answered == ["first", "1", "2", "3"]
    (thread,) = slow.threads
    assert thread is not threading.main_thread() and thread.name.startswith("guidance-interval")


def test_the_newest_question_takes_the_place_of_the_older_one(live):
    answers, slow = ask_all(live, ("a", "1"), ("b", "2"), ("a", "3"), ("a", "4"))
    assert slow.answered == ["first", "4", "2"]
    assert [type(answer) for answer in answers] == [live.desk.Replaced, str, live.desk.Replaced, str]
    answers, slow = ask_all(live, ("a", "1"), ("a", "first"))  # Also by one that is under way.
    assert slow.answered == ["first"] and isinstance(answers[0], live.desk.Replaced) and answers[1] == "FIRST"


def test_equal_questions_share_an_answer(live):
    answers, slow = ask_all(live, ("a", "1"), ("b", "1"), ("a", "1"), ("c", "first"), ("a", "2"))
    assert slow.answered == ["first", "2", "1"]  # b still wants it.
    assert answers == ["1", "1", "1", "FIRST", "2"]
    answers, slow = ask_all(live, ("a", "1"), ("b", "1"), ("a", "2"), ("b", "3"))
    assert slow.answered == ["first", "2", "3"]
    assert [type(answer) for answer in answers] == [live.desk.Replaced, live.desk.Replaced, str, str]


def test_what_nobody_waits_for_is_not_answered(live):
    answers, slow = ask_all(live, ("a", "1"), ("b", "2"), wanted=lambda what: what != "1")
    assert slow.answered == ["first", "2"] and isinstance(answers[0], live.desk.Replaced)


def test_one_that_goes_leaves_the_others_their_answer(live):
    gone = iter((False, True))
    answers, slow = ask_all(live, ("a", "1"), ("b", "1"), wanted=lambda what: what != "1" or next(gone))
    assert slow.answered == ["first", "1"] and answers == ["1", "1"]


def test_an_error_is_handed_on_and_the_next_is_answered(live):
    answers, _ = ask_all(live, ("a", "bad"), ("b", "2"))
    assert isinstance(answers[0], ValueError) and answers[1] == "2"


def test_too_many_are_refused(live, monkeypatch):
    monkeypatch.setattr(live.desk, "MOST_WAITING", 3)
    answers, slow = ask_all(live, ("a", "1"), ("b", "2"), ("c", "3"), ("a", "4"), ("d", "2"))
    assert slow.answered == ["first", "4", "2"]
    assert [type(answer) for answer in answers] == [live.desk.Replaced, str, live.desk.Full, str, str]


# ----------------------------------------------------------------------------
# The route.

PROMPT = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "2": {"class_type": "GuidanceIntervalPreset", "inputs": {"model": ["1", 0], "preset": "sdxl"}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"model": ["2", 0], "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "karras"},
    },
}


def with_client(live, monkeypatch, conversation):
    """Runs conversation(client) against the route on a server of its own."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    server = types.SimpleNamespace(routes=web.RouteTableDef())
    monkeypatch.setattr(live.route, "running_server", lambda: server)
    live.route.register()
    live.route.register()  # Once.
    app = web.Application(client_max_size=2**30)  # As ComfyUI allows.
    app.add_routes(server.routes)

    async def run():
        async with TestClient(TestServer(app)) as client:
            return await conversation(client)

    return asyncio.run(run())


BAD = [
    (b"no json", None, "no JSON"),
    (b'{"prompt": {}', None, "no JSON"),
    (b"\xff\xfe", None, "no JSON"),
    (b"[]", None, "no object"),
    (b"7", None, "no object"),
    (b"null", None, "no object"),
    (b"{}", None, "'prompt' is missing"),
    (b'{"prompt": {}}', None, "'node' is missing"),
    (b'{"prompt": 3, "node": "2"}', None, "no object of nodes"),
    (b'{"prompt": {}, "node": ["2"]}', None, "no id of a node"),
    (b'{"prompt": {}, "node": "2", "client": 7}', None, "client"),
    (b'{"prompt": {}, "node": "2", "client": "%s"}' % (b"x" * 101), None, "client"),
    (b'{"prompt": {}, "node": "2", "sampler": ["3"]}', None, "sampler is no id of a node"),
    (b'{"prompt": {}, "node": "2", "sampler": true}', None, "sampler is no id of a node"),
    (b'{"prompt": {}, "node": "2", "sampler": 3.5}', None, "sampler is no id of a node"),
    (b'{"prompt": {"a": NaN}, "node": "2"}', None, "NaN"),
    (b'{"prompt": {"a": -Infinity}, "node": "2"}', None, "-Infinity"),
    (b'{"prompt": {"a": %s}, "node": "2"}' % (b"9" * 5000), None, "no JSON"),
    (b"[" * 50_000, None, "nested too deep"),
    (b'{"prompt": {"a": %s%s}, "node": "2"}' % (b"[" * 50_000, b"]" * 50_000), None, "nested too deep"),
    (b"{}", "foo", "'foo' is not UTF-8"),
    (b"{}", "punycode", "not UTF-8"),
    (b"{}", "hex", "not UTF-8"),
]


@pytest.mark.parametrize(("body", "charset", "why"), BAD, ids=[f"{why}-{i}" for i, (_, _, why) in enumerate(BAD)])
def test_what_is_no_question_is_refused_in_a_sentence(live, body, charset, why):
    with pytest.raises(ValueError) as error:
        live.route.parse(body, charset)
    assert why in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_question_may_name_its_charset(live):
    body = json.dumps({"prompt": {"ü": 1}, "node": 2, "client": "me"}, ensure_ascii=False).encode()
    for charset in (None, "utf-8", "UTF8"):
        assert live.route.parse(body, charset) == ("me", "2", {"ü": 1}, None)


@pytest.mark.parametrize(("given", "read"), [("3", "3"), (3, "3"), ("4:3", "4:3"), (None, None)])
def test_a_question_may_name_a_sampler(live, given, read):
    body = json.dumps({"prompt": {}, "node": 2, "sampler": given}).encode()
    assert live.route.parse(body) == ("", "2", {}, read)


def test_the_route(live, monkeypatch):
    async def conversation(client):
        class Nobodys(live.desk.concurrent.futures.ThreadPoolExecutor):
            def submit(self, *args, **kwargs):
                raise AssertionError("the loop's own executor serves files")

        asyncio.get_running_loop().set_default_executor(Nobodys())
        good = await client.post(live.route.PATH, json={"prompt": PROMPT, "node": "2"})
        assert good.status == 200 and (await good.json())["steps"] == 6
        odd = await client.post(live.route.PATH, json={"prompt": {"2": 7}, "node": "2"})
        assert "no guidance interval" in (await odd.json())["error"]
        named = await client.post(live.route.PATH, json={"prompt": PROMPT, "node": "2", "sampler": "3"})
        assert named.status == 200 and (await named.json())["sampler_id"] == "3"
        wrong = await client.post(live.route.PATH, json={"prompt": PROMPT, "node": "2", "sampler": "1"})
        assert wrong.status == 200 and "node '1' samples nothing" in (await wrong.json())["error"]
        headers = {"Content-Type": "application/json; charset=foo"}
        for data in (b"{}", b"[" * 50_000):
            bad = await client.post(live.route.PATH, data=data, headers=headers)
            assert bad.status == 400 and "node id" in (await bad.json())["error"]
        large = await client.post(live.route.PATH, data=b" " * (live.route.LARGEST + 1))
        assert large.status == 413 and str(live.route.LARGEST) in (await large.json())["error"]
        text = json.dumps({"prompt": PROMPT, "node": 2}).encode()
        edge = await client.post(live.route.PATH, data=text.ljust(live.route.LARGEST))
        assert edge.status == 200

    with_client(live, monkeypatch, conversation)


def test_a_page_that_asks_on_is_answered_once(live, monkeypatch):
    """Of a drag's questions the one under way and the last are answered."""
    slow = Slow()

    def answer(prompt, node_id, sampler_id):
        return slow(str(prompt["3"]["inputs"]["steps"])), None

    parsed, parse = [], live.route.parse
    monkeypatch.setattr(live.route, "_answer", answer)
    monkeypatch.setattr(live.route, "parse", lambda *args: parsed.append(args) or parse(*args))

    async def conversation(client):
        def ask(steps, client_id="a page"):
            prompt = {**PROMPT, "3": {"class_type": "KSampler", "inputs": {"steps": steps}}}
            return client.post(live.route.PATH, json={"prompt": prompt, "node": "2", "client": client_id})

        async def until(condition):
            while not condition():
                await asyncio.sleep(0.001)

        tasks = []
        for question in ((1,), (2,), (9, "another"), (3,)):
            tasks.append(asyncio.ensure_future(ask(*question)))
            await until(lambda: len(parsed) == len(tasks) and slow.answered)
        dropped = await tasks[1]
        assert dropped.status == 409
        slow.go.set()
        assert [(await task).status for task in tasks] == [200, 409, 200, 200]

    with_client(live, monkeypatch, conversation)
    assert slow.answered == ["1", "3", "9"]


def test_an_answer_is_kept_as_long_as_it_is_true(host, live, monkeypatch, tmp_path):
    import folder_paths

    made = []
    describe = live.route.describe
    monkeypatch.setattr(live.route, "describe", lambda *args: made.append(args) or describe(*args))
    monkeypatch.setenv("GUIDANCE_INTERVAL_PRESETS", str(tmp_path / "mine.toml"))
    folders = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", folders)

    async def conversation(client):
        async def asked_anew(prompt=PROMPT, node="2", client_id="", **more):
            before = len(made)
            question = {"prompt": prompt, "node": node, "client": client_id, **more}
            answer = await client.post(live.route.PATH, json=question)
            assert answer.status == 200
            return len(made) > before

        assert await asked_anew()
        assert not await asked_anew()
        assert not await asked_anew(client_id="somebody else")
        assert await asked_anew({**PROMPT, "4": {"class_type": "X", "inputs": {}}})
        assert not await asked_anew()
        assert await asked_anew(node="3")
        assert await asked_anew(sampler="3") and await asked_anew(sampler="7")
        assert not await asked_anew(sampler="3") and not await asked_anew()
        # A run has told what the model is.
        live.weightless.remember("a key", harness.tiny_model("sd15"))
        assert await asked_anew() and not await asked_anew()
        # The model's file appears, changes, and goes.
        file = tmp_path / "x.safetensors"
        for content in (b"12345678", b"123456789"):
            file.write_bytes(content)
            folder_paths.filename_list_cache.pop("checkpoints", None)
            assert await asked_anew() and not await asked_anew()
        file.unlink()
        folder_paths.filename_list_cache.pop("checkpoints", None)
        assert await asked_anew() and not await asked_anew()
        # So do the user's presets.
        (tmp_path / "mine.toml").write_text("")
        assert await asked_anew() and not await asked_anew()
        # What failed, or had no time, is tried again.
        monkeypatch.setattr(live.trace, "SECONDS", 0.0)
        monkeypatch.setattr(live.trace, "_known", {})
        hurried = {**PROMPT, "5": {"class_type": "X", "inputs": {}}}
        assert await asked_anew(hurried) and await asked_anew(hurried)
        monkeypatch.setattr(live.chart, "chart", lambda run: 1 / 0)
        other = {**PROMPT, "6": {"class_type": "X", "inputs": {}}}
        assert await asked_anew(other) and await asked_anew(other)

    with_client(live, monkeypatch, conversation)


def test_few_answers_are_kept(live):
    answers = live.route.Answers()
    stamp = live.route._stamp([])
    for i in range(live.route.KEEP + 1):
        answers.put(i, str(i), stamp)
        answers.get(0)
    assert answers.get(0) == "0" and answers.get(1) is None and answers.get(live.route.KEEP) == str(live.route.KEEP)
    answers.put("x", "x", None)
    assert answers.get("x") is None


def test_without_a_server_nothing_happens(live, monkeypatch):
    monkeypatch.setattr(live.route, "running_server", lambda: None)
    live.route.register()
