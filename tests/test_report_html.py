"""The page of ``explain``: what it shows, that nothing from outside gets in, and that a browser agrees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import ttt_compiler as ttt
from tests.models import tiny
from tests.passes.families import FAMILIES
from ttt_compiler.errors import TTTError
from ttt_compiler.passes.dataflow import Dataflow, DataflowNode
from ttt_compiler.report import Report, Row, explain
from ttt_compiler.report_assets import STYLE
from ttt_compiler.report_html import render
from ttt_compiler.report_svg import draw

CONFIG = ttt.TTTConfig(layers="every:2", chunk_size=16)
HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'><svg onload=alert(2)>&lt;\ud800"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@cache
def report_of(family: str) -> Report:
    torch._dynamo.reset()
    return explain(FAMILIES[family].build(), CONFIG)


@cache
def forty_layers() -> Report:
    torch._dynamo.reset()
    return explain(tiny(layers=40), CONFIG)


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def roles(self) -> list[str]:
        return [a["data-roles"] or "" for _, a in self.tags if "data-roles" in a]


def flow_of(row: Row) -> Dataflow:
    assert row.dataflow is not None
    return row.dataflow


def by_role(flow: Dataflow, role: str) -> list[int]:
    return [i for i, node in enumerate(flow.nodes) if role in node.roles]


class TestDataflow:
    def test_llama_is_the_gated_mlp_of_the_books(self):
        flow = flow_of(report_of("llama").rows[0])
        assert [(n.op, n.roles) for n in flow.nodes] == [
            ("add", ("stream",)),
            ("mul", ("x",)),
            ("linear", ("up",)),
            ("silu", ("activation",)),
            ("linear", ("up",)),
            ("mul", ("multiply", "h")),
            ("linear", ("down",)),
            ("add", ("residual",)),
        ]
        assert set(flow.edges) == {(0, 7), (1, 2), (1, 4), (2, 3), (3, 5), (4, 5), (5, 6), (6, 7)}
        assert flow.hidden == ((0, 1),)
        assert (flow.nodes[6].weight, flow.nodes[6].shape) == ("[64, 160]", "[2, 9, 64]")

    def test_gpt2_has_an_activation_of_many_operations_and_no_gate(self):
        flow = flow_of(report_of("gpt2").rows[0])
        assert [flow.nodes[i].op for i in by_role(flow, "activation")] == ["pow", "tanh"]
        assert not by_role(flow, "multiply")
        assert [flow.nodes[i].op for i in by_role(flow, "after")] == ["view", "dropout"]
        assert flow.nodes[by_role(flow, "down")[0]].weight == "[160, 64]"

    def test_a_shared_expert_is_drawn_without_the_routed_ones(self):
        dense, routed, shared = (flow_of(row) for row in report_of("deepseek_v3").rows)
        assert len({dense, routed, shared}) == 3
        for flow in (dense, routed, shared):
            for role in ("stream", "x", "up", "activation", "multiply", "h", "down", "residual"):
                assert by_role(flow, role), role
        assert len(shared.nodes) == len(dense.nodes) + 2
        (other,) = by_role(shared, "input")
        assert (by_role(shared, "x")[0], other) in shared.hidden
        assert "4, " in (routed.nodes[by_role(routed, "down")[0]].weight or "")

    @pytest.mark.parametrize(
        "family", ["llama", "gpt2", "deepseek_v3", "gemma2", "phi3", "opt_350m", "bloom"]
    )
    def test_edges_go_forward_and_everything_hangs_together(self, family):
        for row in report_of(family).rows:
            flow = flow_of(row)
            assert all(0 <= a < b < len(flow.nodes) for a, b in (*flow.edges, *flow.hidden))
            (x,), (h,), (down,) = (by_role(flow, role) for role in ("x", "h", "down"))
            reached = {x}
            for a, b in flow.edges:
                reached |= {b} if a in reached else set()
            assert {h, down, *by_role(flow, "residual")} <= reached
            assert (h, down) in flow.edges

    def test_more_than_a_reader_can_follow_is_one_path(self, monkeypatch):
        from ttt_compiler.passes import dataflow

        monkeypatch.setattr(dataflow, "_MAX_NODES", 5)
        torch._dynamo.reset()
        flow = flow_of(explain(FAMILIES["bloom"].build(), CONFIG).rows[0])
        assert flow.notes[-1] == "only the shortest path before the down-projection is drawn, of 11 nodes"
        assert [flow.nodes[i].op for i in (*by_role(flow, "x"), *by_role(flow, "h"))] == ["layer_norm", "mul"]
        assert len(flow.nodes) < len(flow_of(report_of("bloom").rows[0]).nodes)

    def test_what_cannot_be_drawn_says_so_and_stops_nothing(self, monkeypatch):
        from ttt_compiler.passes import dataflow

        monkeypatch.setattr(dataflow._Reader, "_before", lambda self: 1 // 0)
        torch._dynamo.reset()
        report = explain(tiny(), CONFIG)
        assert not report.problems
        assert "not drawn: ZeroDivisionError" in render(report)

    def test_a_converted_model_is_drawn_as_before(self):
        torch._dynamo.reset()
        model = tiny()
        before = explain(model, CONFIG).rows
        after = explain(ttt.convert(model, CONFIG)).rows
        assert [row.dataflow for row in before] == [row.dataflow for row in after]

    def test_json_lists_equal_dataflows_once(self):
        data = json.loads(json.dumps(forty_layers().to_dict()))
        assert len(data["dataflows"]) == 1
        assert {row["dataflow"] for row in data["rows"]} == {0}
        assert data["dataflows"][0]["nodes"][1]["roles"] == ["x"]


class TestPage:
    def test_shows_blocks_status_and_reasons(self):
        report = report_of("deepseek_v3")
        page = Page(render(report))
        for row in report.rows:
            assert row.weight in page.text
        assert "fast weight" in page.text
        assert "refused: routed experts" in page.text
        assert "left out by layers='every:2'" in page.text

    def test_shows_the_numbers_of_the_text(self):
        report = report_of("llama")
        page, text = Page(render(report)), " ".join(str(report).split())
        assert report.costs
        for name, value in report.costs.items():
            assert name in page.text
            assert value in page.text
            assert value in text
        assert "chunk_size" in page.text
        for reason, names in report.rejected:
            assert reason in page.text
            assert names[0] in page.text

    def test_block_without_an_mlp_is_shown(self):
        report = report_of("llama")
        rejected = (("no nonlinearity", ("model.layers.2.conv.weight", "lm_head.7.weight")),)
        page = Page(render(replace(report, rejected=rejected)))
        assert page.text.count("no MLP was found") == 1

    @pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
    def test_roles_are_drawn(self, family):
        report = report_of(family)
        roles = Page(render(report)).roles()
        for role in ("stream", "x", "up", "activation", "h", "down", "residual"):
            assert any(role in r.split() for r in roles), role

    def test_one_drawing_per_structure_and_small(self):
        text = render(forty_layers())
        page = Page(text)
        assert page.count("svg") == 1
        assert len([1 for _, a in page.tags if (a.get("id") or "").startswith("site=")]) == 40
        assert "40 sites have this structure" in page.text
        assert len(text) < 80_000
        assert Page(render(report_of("deepseek_v3"))).count("svg") == 3

    def test_works_alone(self):
        page = Page(render(report_of("deepseek_v3")))
        for _, attributes in page.tags:
            assert "src" not in attributes
            assert (attributes.get("href") or "#").startswith("#")
        assert "http" not in re.sub(r'http-equiv="', "", render(report_of("deepseek_v3")))

    def test_problems_alone_are_a_page(self):
        report = explain(nn.Module())
        assert not report.rows
        page = Page(render(report))
        assert "Problems" in page.text
        assert report.problems[0].splitlines()[0] in page.text

    def test_rows_without_a_capture_are_a_page(self):
        row = Row("a.0.weight", 0, 8, 16, None, None, None, True, None, None)
        page = Page(render(Report("M", rows=(row,))))
        assert "nothing to draw" in page.text
        assert page.count("svg") == 0

    def test_hostile_names_stay_text(self):
        flow = Dataflow(
            (DataflowNode(HOSTILE, HOSTILE, ("x", HOSTILE), HOSTILE), DataflowNode(HOSTILE, "", ("down",))),
            ((0, 1),),
            notes=(HOSTILE,),
        )
        row = Row(HOSTILE, 0, 8, 16, HOSTILE, True, True, False, HOSTILE, None, flow)
        hostile = Report(
            HOSTILE,
            config={HOSTILE: HOSTILE},
            rows=(row, replace(row, weight="w", reason=None, chosen=True)),
            target_source=HOSTILE,
            lowering=HOSTILE,
            rejected=((HOSTILE, (HOSTILE,)),),
            problems=(HOSTILE,),
        )
        text = render(hostile)
        text.encode("utf-8")
        page = Page(text)
        assert page.count("img") == 0
        assert page.count("script") == page.count("style") == page.count("svg") == 1
        assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
        assert page.text.count("<img src=x onerror=alert(1)>") >= 10

    def test_wires_run_through_no_box(self):
        for family in ("gpt2", "deepseek_v3", "gemma2", "bloom"):
            for row in report_of(family).rows:
                svg = draw(flow_of(row), "t")
                boxes = [
                    tuple(map(int, found))
                    for found in re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', svg)
                ]
                assert len(boxes) == len(flow_of(row).nodes)
                for path in re.findall(r'class="wire(?: hidden)?" d="([^"]+)"', svg):
                    for x, y0, y1 in verticals(path):
                        for left, top, width, height in boxes:
                            assert not (left < x < left + width and y0 < top + height - 1 and top + 1 < y1)


def verticals(path: str) -> list[tuple[int, int, int]]:
    found = []
    x = y = 0
    for letter, numbers in re.findall(r"([MVC])([\d\s-]+)", path):
        values = [int(v) for v in numbers.split()]
        if letter == "V":
            found.append((x, y, values[0]))
            y = values[0]
        else:
            x, y = values[-2:]
    return found


def luminance(colour: str) -> float:
    full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("place", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_stands_out(place):
    """WCAG's 4.5 to 1 for every colour of text on every ground it is used on."""
    colours = dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{3,6})\b", STYLE.split(":root{")[place + 1]))
    grounds = ("x", "up", "act", "mul", "h", "res")
    pairs = [(f"{ground}-l", ground) for ground in grounds]
    pairs += [(ink, ground) for ink in ("ink", "soft") for ground in (*grounds, "bg", "card")]
    pairs += [(ink, "card") for ink in ("fast", "refused", "out", "wire")]
    pairs += [("on-fast", "fast"), ("link", "bg")]
    for ink, ground in pairs:
        low, high = sorted((luminance(colours[ink]), luminance(colours[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground, colours[ink], colours[ground])


class TestFile:
    def test_is_written(self, tmp_path):
        path = report_of("llama").save_html(tmp_path / "out.html")
        assert path.read_text(encoding="utf-8") == report_of("llama").to_html()

    def test_missing_folder_says_what_to_type(self, tmp_path):
        with pytest.raises(TTTError, match="mkdir -p"):
            report_of("llama").save_html(tmp_path / "no" / "out.html")
        with pytest.raises(TTTError, match="is a folder"):
            report_of("llama").save_html(tmp_path)


PROBE = """<script>
const all = selector => [...document.querySelectorAll(selector)];
const facts = () => {
  const nodes = all("g.node").map(e => e.getBoundingClientRect());
  const shown = nodes.filter(r => r.width > 0 && r.height > 0);
  const right = Math.max(...shown.map(r => r.right));
  return {sites: all(".site").filter(e => e.offsetParent !== null).map(e => e.id),
    nodes: shown.length, least: Math.min(...shown.map(r => r.width)), right,
    page: document.documentElement.scrollWidth, view: innerWidth,
    fast: all(".fastmark").filter(e => e.getBoundingClientRect().width).length,
    current: all("[aria-current]").map(e => e.getAttribute("href")),
    picked: document.getElementById("picker").value};
};
const found = [];
addEventListener("hashchange", () => {
  found.push(facts());
  document.body.dataset.facts = JSON.stringify(found);
});
addEventListener("load", () => setTimeout(() => {
  found.push(facts());
  const picker = document.getElementById("picker");
  picker.value = "site=0";
  picker.dispatchEvent(new Event("change"));
}, 100));
</script></body>"""


SHOWN = """<script>
addEventListener("load", () => setTimeout(() => {
  const shown = selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects().length);
  document.body.dataset.sites = shown(".site").map(e => e.id).join(" ");
  document.body.dataset.nodes = shown("g.node").length;
}, 100));
</script></body>"""


def without_policy(text: str) -> str:
    """The page with a policy that does not stop what a test adds to measure it."""
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
class TestBrowser:
    def dom(self, page: Path, fragment: str = "", *options: str) -> str:
        done = subprocess.run(
            [
                str(BROWSER),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={page.parent / 'profile'}",
                "--virtual-time-budget=3000",
                *options,
                "--dump-dom",
                page.as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    @pytest.mark.parametrize("width", [500, 1200])
    def test_a_site_is_selected_and_drawn(self, tmp_path, width):
        text = without_policy(render(report_of("deepseek_v3")))
        path = tmp_path / "page.html"
        path.write_text(text.replace("</body>", PROBE), encoding="utf-8")
        dom = Page(self.dom(path, "#site=2", f"--window-size={width},900"))
        first, second = json.loads(next(a["data-facts"] or "" for _, a in dom.tags if "data-facts" in a))
        shared, dense = (flow_of(report_of("deepseek_v3").rows[i]) for i in (2, 0))
        assert first["sites"] == [first["picked"]] == ["site=2"]
        assert first["current"] == ["#site=2"]
        assert first["nodes"] == len(shared.nodes)
        assert first["least"] > 80
        assert first["fast"] == 0
        assert first["page"] <= first["view"]
        assert first["right"] <= first["view"]
        assert second["sites"] == [second["picked"]] == ["site=0"]
        assert second["current"] == ["#site=0"]
        assert second["nodes"] == len(dense.nodes)
        assert second["fast"] == 1

    @pytest.mark.parametrize(("fragment", "shown"), [("", 0), ("#site=1", 1)])
    def test_works_without_its_script(self, tmp_path, fragment, shown):
        text = without_policy(render(report_of("deepseek_v3")))
        text = re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)
        path = tmp_path / "page.html"
        path.write_text(text.replace("</body>", SHOWN), encoding="utf-8")
        (found,) = (a for _, a in Page(self.dom(path, fragment)).tags if "data-sites" in a)
        assert found["data-sites"] == f"site={shown}"
        assert found["data-nodes"] == str(len(flow_of(report_of("deepseek_v3").rows[shown]).nodes))

    def test_the_policy_lets_only_the_page_s_own_script_run(self, tmp_path):
        path = tmp_path / "page.html"
        stranger = "<script>document.body.dataset.stranger = 1</script></body>"
        path.write_text(render(report_of("llama")).replace("</body>", stranger), encoding="utf-8")
        dom = Page(self.dom(path, "#site=1"))
        assert [a["href"] for _, a in dom.tags if "aria-current" in a] == ["#site=1"]
        assert not any("data-stranger" in a for _, a in dom.tags)
