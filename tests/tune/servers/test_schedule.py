"""The noise levels of an image: what the server forecasts of each sampler, and when that is not to be relied on."""

import contextlib
import json
import math

import pytest
from broken_server import GRAPH, INFO, SMALL, answer, declared, forecast, history, told
from guidance_interval.tune import sampler, study
from guidance_interval.tune.servers import comfyui, schedule
from guidance_interval.tune.servers.backend import CONDITIONAL, Job, Setting

LEVELS = {"3": [None, 8.0, 2.0], "6": [4.0, 1.0, 0.5]}


@pytest.fixture
def two_passes(server, tmp_path):
    """A workflow of two samplers, on a server that forecasts both."""
    two = declared(["LATENT"], model="MODEL", positive="CONDITIONING", seed="INT", cfg="FLOAT", latent="LATENT")
    server.broken["object_info"] = told(INFO | {"KSampler": two})
    first = GRAPH["3"]["inputs"] | {"scheduler": "karras", "steps": 3}
    second = first | {"latent": ["3", 0], "denoise": 0.5}
    graph = GRAPH | {
        "3": {"class_type": "KSampler", "inputs": first},
        "6": {"class_type": "KSampler", "inputs": second},
        "4": {"class_type": "Decode", "inputs": {"samples": ["6", 0]}},
    }
    server.broken["guidance_interval"] = forecast(LEVELS)
    (tmp_path / "two.json").write_text(json.dumps(graph))
    return tmp_path / "two.json"


def made(server, path):
    return contextlib.closing(comfyui.Comfy(path, [server.url], limits=SMALL))


def assert_unknown(server, path, capsys, says=""):
    """Nothing is known, which one note says, and images come all the same."""
    with made(server, path) as backend:
        assert backend.sigmas is None and study.space(backend)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("note: the schedule cannot be told (") and says in line
        assert line.endswith("); seconds are the cost") and line.isprintable() and len(line) < 700
        assert server.url in line


def test_of_two_passes_all_levels_are_counted_and_told(server, two_passes):
    with made(server, two_passes) as backend:
        assert backend.sigmas.tolist() == [math.inf, 8.0, 4.0, 2.0, 1.0, 0.5]
        assert "  node 3 (KSampler): 3 evaluations, sigma inf to 2" in backend.describe()
        assert "  node 6 (KSampler): 3 evaluations, sigma 4 to 0.5" in backend.describe()
        setting, ranges = Setting(0.9, 5.0, 7.0), study.space(backend)
        start, end, _ = sampler.coordinates(setting, ranges, backend.sigmas)
        assert setting.rows(backend.sigmas) == 9 == pytest.approx(6 * (1 + end - start))  # As the search predicts them.
    assert "prompt" not in server.asked


def test_the_question_is_of_the_interval_node_and_each_sampler(server, two_passes):
    asked, answers = [], forecast(LEVELS)
    server.broken["guidance_interval"] = lambda handler: (asked.append(json.loads(handler.body)), answers(handler))
    with made(server, two_passes) as backend:
        graph = backend.workflow.graph(Setting(0.0, math.inf, 7.0))
    assert [(q["node"], q.get("sampler")) for q in asked] == [("guidance-interval-1", n) for n in (None, "3", "6")]
    assert all(q["prompt"] == graph for q in asked) and graph["2"]["inputs"]["text"] == "a cat"


def test_one_and_no_evaluation_are_told_too(server, two_passes):
    server.broken["guidance_interval"] = forecast({"3": [3.0], "6": []})
    with made(server, two_passes) as backend:
        assert backend.sigmas.tolist() == [3.0]
        assert "  node 3 (KSampler): 1 evaluation, sigma 3 to 3" in backend.describe()
        assert "  node 6 (KSampler): 0 evaluations" in backend.describe()


@pytest.mark.parametrize("change", [
    {"sigmas": "missing"}, {"sigmas": 3}, {"sigmas": {"a": 1}}, {"sigmas": ["x"]}, {"sigmas": [True]}, {"sigmas": [-1]},
    {"sigmas": [math.nan]}, {"sigmas": [10**400]}, {"sigmas": [1e38]}, {"sigmas": [[1.0]]},
    {"sigmas": [1.0] * (schedule.MOST + 1)}, {"sigmas": None},
    {"samplers": "missing"}, {"samplers": None}, {"samplers": 7}, {"samplers": [["3"]]}, {"samplers": [{}]},
    {"samplers": []}, {"samplers": ["99"]}, {"samplers": ["3"]}, {"samplers": "3"},
    {"notes": "missing"}, {"notes": None}, {"notes": [1]}, {"notes": [["linked"]]}, {"notes": [["a", "b", "c"]]},
    {"error": "sigma_lo must be below sigma_hi"}, {"error": {"message": "no \x1b[2J"}}, {"error": ["a"] * 9999},
])  # fmt: skip
def test_an_answer_that_tells_no_levels_costs_no_study(server, two_passes, capsys, change):
    server.broken["guidance_interval"] = forecast(LEVELS, **change)
    if "error" in change:
        server.broken["guidance_interval"] = lambda h: told(change)(h)
        with made(server, two_passes) as backend:
            assert backend.sigmas is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("note: the schedule cannot be told (") and line.isprintable() and len(line) < 700
        return
    assert_unknown(server, two_passes, capsys)
    assert "prompt" not in server.asked


def test_an_older_version_of_our_nodes_knows_no_forecast(server, two_passes, capsys):
    server.broken["guidance_interval"] = answer(b"404: Not Found", 404, "text/plain")
    assert_unknown(server, two_passes, capsys, "answers 404")


UNSURE = [
    *("adaptive", "also", "choice", "linked", "no_sampler", "one_evaluation", "read_as", "switched_off", "unfollowed"),
    *("unknown", "unknown_sampler", "unknown_sigmas", "without", "of a later version"),
]


@pytest.mark.parametrize("code", UNSURE)
def test_what_the_server_assumes_is_not_used(server, two_passes, capsys, code):
    notes = [["samplers", "x"], [code, "so \x1b[2J"], ["model", ""]]
    server.broken["guidance_interval"] = forecast(LEVELS, notes=notes)
    assert_unknown(server, two_passes, capsys, f"is not sure of node 3 (KSampler): {code.replace('_', ' ')} so")
    assert "prompt" not in server.asked  # A run would not settle that.


def test_what_it_says_of_guidance_does_not_matter(server, two_passes):
    server.broken["guidance_interval"] = forecast(LEVELS, notes=[[code, "x"] for code in schedule.HARMLESS])
    with made(server, two_passes) as backend:
        assert len(backend.sigmas) == 6


@pytest.fixture
def unloaded(server, two_passes):
    """As `two_passes`, with a model that the server knows once it has rendered an image."""
    before, after = forecast(LEVELS, notes=[["model", "Loader"]]), forecast(LEVELS)
    server.broken["guidance_interval"] = lambda h: (after if "history" in server.asked else before)(h)
    return two_passes


def test_a_model_that_was_not_loaded_is_known_after_one_image(server, unloaded, capsys):
    with made(server, unloaded) as backend:
        assert len(backend.sigmas) == 6 and server.asked.count("prompt") == 1
    assert capsys.readouterr().err == ""


def test_a_model_that_stays_unknown_is_not_assumed(server, two_passes, capsys):
    server.broken["guidance_interval"] = forecast(LEVELS, notes=[["model", "Loader"]])
    assert_unknown(server, two_passes, capsys, "is not sure of node 3 (KSampler): model Loader")
    assert server.asked.count("prompt") == 1


@pytest.mark.parametrize(
    ("part", "handler", "says"),
    [
        ("prompt", told({"error": {"message": "no such file"}}, 400), "no such file"),
        ("prompt", told(None), "/prompt answers null, which is not what it should be"),
        ("history", told({}), "has not rendered an image in 0.4 s"),
        ("history", history(status={"messages": [["execution_error", {"node_type": "Loader"}]]}), "Loader: it failed"),
        ("history", answer(b"<html>"), "which is no JSON"),
    ],
)
def test_where_the_first_image_fails_nothing_is_known(server, unloaded, capsys, part, handler, says):
    server.broken[part] = handler
    with made(server, unloaded) as backend:
        assert backend.sigmas is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the schedule cannot be told (") and says in line


@pytest.mark.parametrize("level", [None, 0.0])
def test_a_schedule_without_a_level_to_bound_is_none(server, two_passes, level):
    server.broken["guidance_interval"] = forecast({"3": [level], "6": [level]})
    with made(server, two_passes) as backend:
        assert backend.sigmas is None and study.space(backend)
        assert len(list(backend.render([Job(CONDITIONAL, "a dog", 1)]))) == 1
