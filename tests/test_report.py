"""The report: figures, page and console table say what the results say, and nothing more."""

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from vas.evaluation.console import results_table
from vas.evaluation.figures import draw_all, file_name
from vas.evaluation.findings import composed, findings
from vas.evaluation.grouping import group, number
from vas.evaluation.report import ReportData, SampleColumn, SamplePrompt, SampleToken, render_report
from vas.evaluation.results import Result
from vas.evaluation.trust import judge

PNG = b"\x89PNG\r\n\x1a\n"
TWO = ["positive", "concise"]


def result(method, setting, objective, mean, half=0.06, **other):
    fields = {
        "n": 120, "kl": 0.0, "length": 60.0, "decode_flops": 2e10, "tokens_generated": 60.0,
        "tokens_per_s": 200.0, "distinct_1": 0.3, "distinct_2": 0.8, "seed": 7, "git_revision": "abc1234",
    }  # fmt: skip
    fields |= other
    return Result(
        method=method, setting=json.dumps(setting), objective=objective, reward_mean=mean,
        ci_low=mean - half, ci_high=mean + half, **fields,
    )  # fmt: skip


def results(objectives):
    """Base 0.25 on everything; what a method seeks goes up, the rest stays. In no tidy order."""
    rows = []
    for sought in objectives:
        for beta, mean, kl in ((8.0, 0.71, 6.1), (2.0, 0.30, 0.9)):  # β=2's interval overlaps base's
            for name in objectives:
                reached = mean if name == sought else 0.25
                rows.append(result("vas", {sought: beta}, name, reached, kl=kl, decode_flops=2.8e10))
        for n, mean in ((4, 0.64), (2, 0.50)):
            kl = math.log(n) - (n - 1) / n
            for name in objectives:
                reached = mean if name == sought else 0.25
                setting = {"n": n, "by": {sought: 1.0}}
                rows.append(result("best-of-n", setting, name, reached, kl=kl, decode_flops=2e10 * n))
    if len(objectives) > 1:
        rows += [result("vas", dict.fromkeys(objectives, 4.0), name, 0.55, kl=4.0) for name in objectives]
    return rows + [result("base", {}, name, 0.25) for name in objectives]


def held_out(objectives, explained=0.43):
    bins = [{"value": x / 4 - 1, "reward": 0.9 * (x / 4 - 1), "states": 100} for x in range(10)]
    quarters = [math.nan if math.isnan(explained) else 0.1, 0.2, 0.4, explained]
    return {name: {"explained_variance": explained, "by_quarter": quarters, "calibration": bins} for name in objectives}


def history(objectives, explained=0.43):
    metrics = held_out(objectives, explained)
    return [{"epoch": e + 1, "losses": [3 / (i + 1) for i in range(30)], "held_out": metrics} for e in range(2)]


def trust(objectives, scatter=0.5):
    """V that is right but for a scatter, of 20 prefixes with 10 completions each; nothing varies without one."""
    generator = np.random.default_rng(0)
    found = []
    for name in objectives:
        value = scatter * generator.normal(size=20)
        rewards = [each + scatter * generator.normal(size=10) for each in value]
        found.append(judge(name, value, rewards, np.full(20, 0.25), value, value, resamples=20, seed=0))
    return found


def page(objectives=TWO, figures=None, metrics=None, rows=None, **other):
    data = {
        "title": "demo", "about": {"base model": "Tiny LM"}, "stages": {"rollouts": 95.0},
        "config_yaml": "name: demo",
        "results": results(objectives) if rows is None else rows, "objectives": objectives,
        "figures": figures or {}, "held_out_metrics": metrics or {}, "trust": [], "samples": [],
    }  # fmt: skip
    return render_report(ReportData(**data | other))


@pytest.fixture(scope="module")
def figures():
    return draw_all(results(TWO), held_out(TWO), history(TWO), trust(TWO))


def test_every_figure_is_a_png_of_some_size(figures):
    assert list(figures) == [
        "reward_vs_kl_positive.png", "reward_vs_compute_positive.png",
        "reward_vs_kl_concise.png", "reward_vs_compute_concise.png",
        "trade_off.png", "calibration.png", "explained_variance.png", "trust.png", "learning_curve.png",
    ]  # fmt: skip
    for name, content in figures.items():
        assert content.startswith(PNG), name
        assert len(content) > 20_000, name


def test_one_objective_has_no_trade_off():
    drawn = draw_all(results(["positive"]), held_out(["positive"]), history(["positive"]), [])
    assert "trade_off.png" not in drawn
    assert len(drawn) == 5
    text = page(["positive"], drawn, held_out(["positive"]))
    assert "steered at decoding time towards\npositive;" in text


def test_no_training_no_figures_of_it():
    assert set(draw_all(results(["positive"]), {}, [], [])) == {
        "reward_vs_kl_positive.png",
        "reward_vs_compute_positive.png",
    }


@pytest.mark.filterwarnings("error")
def test_figures_bear_nan_and_odd_names():
    names = ["$a_b$ / ../c", "_hidden"]
    rows = [*results(names), result("vas", {names[0]: -4.0}, names[0], math.nan, kl=math.nan)]
    drawn = draw_all(rows, held_out(names, math.nan), history(names, math.nan), trust(names, scatter=0.0))
    assert len(drawn) == 9
    for name in drawn:
        assert re.fullmatch(r"[A-Za-z0-9_-]+\.png", name)
    text = page(names, drawn, held_out(names, math.nan), rows, trust=trust(names, scatter=0.0))
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


def test_file_names_stay_apart():
    assert file_name("k", "a/b") != file_name("k", "a b")
    assert file_name("k", "plain") == "k_plain.png"


def test_page_holds_figures_and_asks_for_nothing_outside(figures):
    text = page(figures=figures, metrics=held_out(TWO))
    assert text.count("data:image/png;base64,iVBOR") == len(figures)
    assert not re.search(r"https?://|<script|<link|url\(", text)


def test_trust_has_a_row_a_figure_and_a_column_an_objective():
    found = trust(TWO)
    text = page(metrics=held_out(TWO), trust=found)
    table = text.split('<section id="trust">')[1].split("</table>")[0]
    assert re.findall(r'<th scope="col">([^<]*)</th>', table)[1:] == TWO
    explained = [f"{each.explained_variance:.2f}" for each in found]
    assert re.search(rf"<td>explained variance[^<]*</td><td>{explained[0]} \[.*</td><td>{explained[1]} \[", table)
    assert "<td>spread of V over the candidates</td><td>0.25</td><td>0.25</td>" in table
    assert "20 held-out responses were cut" in text
    assert '<section id="trust">' not in page()
    three = draw_all(results(["a"]), {}, [], trust(["a", "b", "c"]))["trust.png"]
    assert three.startswith(PNG)


def test_headline_is_computed():
    text = page()
    assert "0.25 → 0.71" in text
    assert "95 % 0.65 to 0.77 at β=8, 6.1 nats from base, 1.40× base&#39;s FLOPs" in text
    assert "best of 4 reaches 0.64 (0.58 to 0.70) at 4.00× the FLOPs: the intervals overlap" in text
    assert "positive 0.25 → 0.55 ▲, concise 0.25 → 0.55 ▲" in text
    assert "1 min 35 s" in text


def test_headline_owns_up():
    rows = [
        result("base", {}, "positive", 0.25),
        result("vas", {"positive": 2.0}, "positive", 0.28, length=30.0, distinct_2=0.4),
    ]
    finding = findings(rows, ["positive"])[0]
    assert not finding.clear
    assert finding.verdict == "not clearly above base"
    assert finding.cautions == [
        "responses are 50 % shorter than base's",
        "wording repeats more: distinct-2 0.80 → 0.40",
    ]
    assert findings(rows[1:], ["positive"]) == []  # no base, no claim


def test_composed_says_which_objective_moved():
    rows = [result("base", {}, name, 0.25) for name in TWO]
    setting = {"positive": 4.0, "concise": -4.0}
    rows += [result("vas", setting, "positive", 0.6), result("vas", setting, "concise", 0.24)]
    assert composed(rows, TWO)[0].verdict == "clearly moved as asked: positive"


def test_triangles_only_where_the_interval_is_clear_of_bases():
    table = page(["positive"]).split("<tbody>")[1].split("</tbody>")[0]
    marked = {
        re.search(r"<td>([^<]*)</td>", row)[1] for row in table.split("<tr>") if "▲" in row
    }  # the first cell is the label
    assert marked == {"best of 2 by positive", "best of 4 by positive", "VAS positive β=8"}
    assert table.count('class="best"') == 1
    assert "▼" not in table


def test_table_starts_with_base_and_sorts_by_strength():
    labels = [setting.label for setting in group(results(TWO))]
    assert labels == [
        "base",
        "best of 2 by positive", "best of 4 by positive", "best of 2 by concise", "best of 4 by concise",
        "VAS positive β=2", "VAS positive β=8", "VAS concise β=2", "VAS concise β=8",
        "VAS positive β=4, concise β=4",
    ]  # fmt: skip


def test_what_people_and_models_write_is_escaped():
    evil = "<script>alert('x')</script>"
    tokens = [
        SampleToken(evil, 1.5, -2.0),
        SampleToken(" plain", 0.0, -1.0),
        SampleToken(" less", -9.0, -1.0),
    ]
    column = SampleColumn(evil, tokens, {evil: 0.5})
    text = page(
        title=evil,
        about={evil: evil},
        config_yaml=evil,
        samples=[SamplePrompt(evil, [column])],
        stages={evil: 1.0},
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8


def test_tokens_are_shaded_by_how_far_guidance_moved_them():
    tokens = [
        SampleToken("up", 1.5, -2.0),
        SampleToken("\n same", 0.0, -1.0),
        SampleToken("down", -9.0, -1.0),
    ]
    text = page(samples=[SamplePrompt("p", [SampleColumn("base", tokens, {"positive": 0.512})])])
    assert '<span class="up" style="--shade:0.34" title="log-prob −2.00 → −0.50 (+1.50)">up</span>' in text
    assert '<span title="log-prob −1.00 → −1.00 (+0.00)">\n same</span><span class="down"' in text
    assert "--shade:0.75" in text  # as strong as it gets
    assert "positive <b>0.51</b>" in text
    assert "cut after" not in text
    assert "cut after 3 tokens" in page(samples=[SamplePrompt("p", [SampleColumn("base", tokens, {}, cut=True)])])


def test_numbers():
    assert [number(x, 2) for x in (0.0, -0.001, -1.5, 1234.5, math.nan)] == [
        "0.00",
        "0.00",
        "−1.50",
        "1,234.50",
        "–",
    ]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("objectives", [["positive"], TWO, [*TWO, "[bold]readable"]])
def test_console_table_fits_the_terminal(objectives, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(results_table(results(objectives), width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("[0.") == len(re.findall(r"\[0\.\d+, [\d.]+\]", text)), "no interval is broken"
    assert "…" not in text
    rows = [line for line in text.splitlines() if line.strip().startswith("VAS positive")]
    assert "▲ 0.71" in rows[1]
    assert "▲" not in rows[0]
    assert all(name[:12] in text for name in objectives)
