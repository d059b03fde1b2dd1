# SPDX-License-Identifier: Apache-2.0
"""The report: built from the folder's files alone, complete, offline, and safe to open."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from chatlearn.errors import OutputError
from chatlearn.observability.charts import (
    Series,
    is_noisy,
    line_chart,
    moving_average,
    stacked_chart,
    thin,
    y_range,
)
from chatlearn.observability.metrics import MetricStore
from chatlearn.observability.report import render, write_report
from chatlearn.observability.report_curves import curves_html
from chatlearn.observability.transcripts import TranscriptLog

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)"></pre></script>'


class Page(HTMLParser):
    """Collects a page's elements, their attributes and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.open_tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "path", "circle"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] == "script":
            self.scripts.append(data)
        elif not self.open_tags or self.open_tags[-1] != "style":
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(folder: Path, episodes: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    store = MetricStore(folder / "metrics.jsonl")
    log = TranscriptLog(folder / "transcripts.jsonl", per_episode=4)
    for episode in range(episodes + 1):
        metrics: dict[str, float] = {}
        if episode:
            metrics = {
                "reward/rewards": episode / episodes,
                "reward/my_own_part": 0.5,
                "policy_trainer/loss": math.nan if episode == 7 else 1 / episode,
                "policy/response_length": 20.0,
                "policy/response_length_max": 30.0,
                "policy/generated_tokens": 1000.0,
                "time/env_flow": 0.2,
                "time/trainer_flow": 0.4,
                "time/episode": 0.6,
            }
        if episode % 10 == 0:
            metrics["eval/reward/accuracy"] = 0.25 + 0.5 * episode / episodes
            log.record(
                {
                    "uid": [100 * episode + i for i in range(4)],  # uids go on between evaluations
                    "prompt": [EVIL, "p1", "p1", "p2"],
                    "completion": [f"{EVIL} at {episode}", "b", "", f"last {episode}"],
                    "rewards": [0.0, 0.5, 1.0, math.nan],
                    "rewards/exact": [0.0, 1.0, 1.0, 1.0],
                    "finish_reason": ["length", "stop", "stop", "stop"],
                },
                episode=episode,
                phase="eval",
            )
        store.write(episode, episode * 4, metrics)
        if episode:
            chat = [{"role": "user", "content": EVIL}]
            log.record(
                {"prompt": [chat, chat], "completion": ["x", "y"], "advantages": [1.0, -1.0]},
                episode=episode,
                phase="train",
            )
    store.close()
    log.close()
    (folder / "config.yaml").write_text(
        f"runtime:\n  seed: 3\n  backend: local\nmodels:\n  p: {{stop: ['{EVIL}'], empty: {{}}}}\n"
    )
    (folder / "config_origins.json").write_text(
        json.dumps({"runtime.seed": "command line", "runtime.backend": "default"})
    )
    (folder / "flows").mkdir(exist_ok=True)
    (folder / "flows" / "env_flow.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(3)</script></svg>'
    )
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    run = make_run(tmp_path_factory.mktemp("runs") / "my-run")
    target = write_report(run)
    assert target == run / "report.html"
    return Page(target.read_text())


def test_it_shows_everything(page):
    for text in (
        "my-run",
        "30 episodes · 120 train steps · 4 evaluations",
        "0.25 →",
        "0.75",
        "30k",
        "NaN or infinite in",
        "policy_trainer/loss",
        "Samples before and after",
        "after episode 30",
        "last 30",
        "cut off at the limit",
        "(empty)",
        "reward NaN",
        "Training samples",
        "advantage -1",
        "runtime.seed",
        "command line",
        "models.p.stop",
    ):
        assert text in page.text, text
    titles = [a["aria-label"] for a in page.all("svg")]
    assert titles[0] == "accuracy"
    for title in ("rewards", "my own part", "loss", "response length", "time by phase"):
        assert titles.count(title) == 1
    assert page.open_tags == []


def test_before_and_after_pair_by_prompt_even_when_uids_went_on(page):
    assert page.text.count("before\n") == 4
    assert page.text.count("after episode 30") == 4
    assert "last 0" in page.text
    assert "after episode 10" not in page.text


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ([1, 2, 3], "[1, 2, 3]"),
        (torch.tensor([4, 5]), "[4, 5]"),
        ([], "[]"),
        (["é", {"role": "user"}], '["é", {"role": "user"}]'),
        ([{"text": "no role"}], '[{"text": "no role"}]'),
        ({"question": "<b>"}, '{"question": "<b>"}'),
    ],
)
def test_prompts_that_are_no_chat_are_shown_as_json(tmp_path, prompt, shown):
    log = TranscriptLog(tmp_path / "transcripts.jsonl")
    for episode in (0, 1):
        for phase in ("train", "eval"):
            log.record({"prompt": [prompt], "completion": ["c"]}, episode=episode, phase=phase)
    log.close()
    page = Page(render(tmp_path))
    assert page.open_tags == []
    assert page.text.count(shown) == 3  # before and after share a card
    assert ("div", {"class": "message"}) not in page.elements


def test_nothing_from_the_run_becomes_markup(page):
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert all(not a.get("onerror") for _, a in page.elements)
    assert page.text.count("<script>alert(1)</script>") > 4


def test_it_needs_no_network_and_lets_only_its_own_script_run(page):
    for name, attributes in page.elements:
        for attribute in ("src", "href", "data"):
            value = attributes.get(attribute) or ""
            assert value == "" or value.startswith(("data:image/svg+xml;base64,", "#")), name
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_values_under_the_pointer_are_the_metrics(page):
    figures = [json.loads(a["data-chart"] or "") for a in page.all("figure") if "data-chart" in a]
    (loss,) = [f for f in figures if f["series"][0]["label"] == "policy_trainer/loss"]
    assert loss["series"][0]["points"]["4"] == "0.25"
    assert loss["series"][0]["points"]["7"] == "nan"
    (length,) = [f for f in figures if f["series"][0]["label"] == "policy/response_length"]
    assert [s["label"] for s in length["series"]][1] == "policy/response_length_max"


@pytest.mark.parametrize("missing", ["metrics.jsonl", "transcripts.jsonl", "config.yaml", "flows"])
def test_whatever_is_missing_is_left_out(tmp_path, missing):
    run = make_run(tmp_path / "run", episodes=10)
    path = run / missing
    (run / f"other-{missing}").parent.mkdir(exist_ok=True)
    path.rename(run / f"other-{missing}")
    assert Page(render(run)).open_tags == []


def test_one_episode_one_evaluation_and_a_half_written_line(tmp_path):
    run = make_run(tmp_path / "run", episodes=1)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"episode": 2, "lo')
    text = Page(render(run)).text
    assert "Evaluation samples" in text
    assert "1 episode · 4 train steps · 1 evaluation" in text


def test_no_run_and_damaged_files_are_errors_that_say_where(tmp_path):
    with pytest.raises(OutputError, match="no run"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", episodes=1)
    for name, text in {
        "summary.json": "[1]",
        "config_origins.json": "{",
        "config.yaml": "a: [",
    }.items():
        old = (run / name).read_text() if (run / name).exists() else None
        (run / name).write_text(text)
        with pytest.raises(OutputError, match=re.escape(name)):
            render(run)
        (run / name).write_text(old or "{}")


def test_a_summary_overrules_and_adds_tiles(tmp_path):
    run = make_run(tmp_path / "run", episodes=2)
    (run / "summary.json").write_text(
        json.dumps({"accuracy_before": 0.3, "accuracy_after": 0.9, "seconds": 125, "peak_gib": 2.5})
    )
    text = Page(render(run)).text
    for part in ("0.3 →", "0.9", "2:05", "peak gib", "2.5"):
        assert part in text


def tiles(html: str) -> dict[str, str]:
    """Return the text of every tile by its label."""
    found = re.findall(r'<div class="tile ?\w*"><span>(.*?)</span>(.*?)</div>', html)
    return {label: re.sub("<.*?>", " ", rest) for label, rest in found}


def test_tiles_of_several_policies_count_all_tokens_and_name_every_reward(tmp_path):
    store = MetricStore(tmp_path / "metrics.jsonl")
    for episode in range(1, 4):
        metrics = {f"{who}_reward/rewards": i + episode / 10 for i, who in enumerate("abcd")}
        metrics |= {f"{who}/generated_tokens": 1000.0 for who in "ab"}
        metrics |= {f"{who}_trainer/trained_tokens": 300.0 for who in "ab"}
        metrics |= {"eval/a/pass@1": 0.5, "eval/b/pass@1": 0.25, "eval/a/generated_tokens": 9e9}
        if episode == 2:
            metrics |= {"a_reward/rewards": math.nan, "b/generated_tokens": math.nan}
        store.write(episode, episode, metrics)
    store.close()
    found = tiles(render(tmp_path))
    assert "5k" in found["tokens sampled"]  # all but what was no number
    assert "1.8k" in found["tokens trained on"]
    rewards = {label: text for label, text in found.items() if label.startswith("training")}
    assert list(rewards) == [f"training {who}_reward" for who in "abc"]
    assert "0.1 →" in rewards["training a_reward"]
    assert "1.1 →" in rewards["training b_reward"]
    assert "held-out pass@1 of a" in found


def test_long_runs_stay_small_and_fast(tmp_path):
    store = MetricStore(tmp_path / "metrics.jsonl")
    for episode in range(1, 5001):
        store.write(episode, episode, {f"m/x{i}": float(episode % 7) for i in range(10)})
    store.close()
    start = time.perf_counter()
    html = render(tmp_path)
    assert time.perf_counter() - start < 10
    assert len(html) < 1_500_000


def test_metrics_find_their_group():
    names = {
        "reward/rewards": "Reward",
        "reward/rewards/exact": "Reward",
        "advantage/reward_std": "Reward",
        "eval/reward/accuracy": "Evaluation",
        "trainer/clip_low": "Learning",
        "trainer/lr": "Learning",
        "trainer/mismatch_max": "Learning",
        "policy/stop_fraction": "Samples",
        "policy/generated_tokens_per_s": "Speed and memory",
        "mine/temperature": "Other",
    }
    html = curves_html([{"episode": i, **dict.fromkeys(names, 0.5)} for i in (1, 2)])
    found = dict.fromkeys(names, "")
    for section in html.split("<h3>")[1:]:
        for name in names:
            if f"{name} <b>" in section:
                found[name] += section.split("</h3>")[0]
    assert found == names


def test_counts_of_failures_are_drawn_only_where_there_are_some():
    name, other = "outcomes/reward/failed", "eval/outcomes/reward/timed_out"
    rows = [{"episode": i, "reward/rewards": 1.0, name: 0.0, other: 0.0} for i in (1, 2)]
    html = curves_html(rows)
    assert name not in html
    assert other not in html
    assert "reward/rewards <b>" in html
    rows[1][name] = 2.0
    assert f"{name} <b>" in curves_html(rows)


def test_charts():
    ramp = Series("a", list(range(50)), [math.nan if i == 9 else float(i) for i in range(50)])
    drawn = line_chart("t<i>", [ramp])
    assert "t&lt;i&gt;" in drawn
    assert drawn.count("✕") == 1
    assert drawn.count("M", drawn.index('class="line')) >= 2  # a gap, not a bridge
    assert 'class="line c0 raw"' not in drawn
    wild = Series("b", list(range(50)), [float(i % 2) for i in range(50)])
    assert 'class="line c0 raw"' in line_chart("wild", [wild])
    assert stacked_chart("t", []) == ""
    assert stacked_chart("t", [Series("a", [1, 2], [0.0, 0.0])]) == ""
    assert "67%" in stacked_chart("t", [Series("a", [1], [1.0]), Series("b", [1], [2.0])])
    assert is_noisy([0, 1, 0, 1, 0, 1])
    assert not is_noisy([0, 1, 2])
    assert not is_noisy([])


def test_chart_arithmetic():
    assert y_range([]) == (0, 1, False)
    assert y_range([0.5, 0.9], "held-out accuracy") == (0, 1, False)
    assert y_range([3, 3])[0] < 3 < y_range([3, 3])[1]
    spike = [float(i % 10) for i in range(100)] + [1000.0]
    assert y_range(spike)[2]
    assert y_range(spike)[1] < 20
    assert moving_average([0, 3, 6], 3) == [1.5, 3, 4.5]
    assert moving_average([0, 0, 9, 0, 0], 5, robust=True) == [0] * 5
    assert math.isnan(moving_average([1, math.nan, 1], 3)[1])
    long = thin(Series("a", list(range(1000)), [1.0] * 999 + [math.inf]))
    assert len(long.x) == 400
    assert math.isnan(long.y[-1])
