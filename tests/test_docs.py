"""The documentation: generated pages are up to date, links lead somewhere, examples run."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from command import ROOT, blocks, python, tiny_run

from vas.config import RunConfig, load_config
from vas.serving.config import Serving

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_generated_pages_are_up_to_date():
    for path, text in generator().pages().items():
        assert path.read_text() == text, "run: python docs/generate.py"


def test_every_key_of_the_config_has_a_meaning():
    for config in (RunConfig, Serving):
        for path, section in generator()._sections(config, ""):
            for name, field in section.model_fields.items():
                assert field.description, f"{path}.{name} has no docstring"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_can_be_found():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def test_the_configs_shown_are_valid(tmp_path):
    shown = blocks(ROOT / "README.md", "yaml")
    assert shown
    for text in shown:
        (tmp_path / "config.yaml").write_text(text)
        load_config(tmp_path / "config.yaml")


def test_the_example_of_the_library_runs(tmp_path):
    """README's Python runs as it stands, on a tiny run in the place of the one it names."""
    run = tiny_run(tmp_path)
    (code,) = [code for code in blocks(ROOT / "README.md", "python") if "Engine(" in code]
    assert code.count('"runs/demo"') == 1
    code = code.replace('"runs/demo"', json.dumps(run.location))
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_the_reward_of_the_documentation_scores():
    (code,) = blocks(ROOT / "docs" / "rewards.md", "python")
    space = {}
    exec(code, space)
    assert space["exclaims"]([], ["Hello! You!", "Hello."]) == [2.0, 0.0]
