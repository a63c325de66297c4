"""The pages' links, commands and options lead to what exists; their numbers: tests/test_summary.py."""

import re

import pytest

from engine.base.options import flat_fields
from evaluate import EvaluateConfig
from export import ExportConfig
from hellaswag import HellaSwagConfig
from sample import SampleConfig
from tests.helpers import ROOT
from train import TrainConfig

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LINKED = [
    *PAGES,
    *(
        page
        for folder in ("training_logs", "bench", "config")
        for page in sorted((ROOT / folder).rglob("README.md"))
    ),
]
TRAIN = {path.name for path in ROOT.glob("train*.py")}
OPTIONS = dict.fromkeys(TRAIN, TrainConfig) | {
    "sample.py": SampleConfig,
    "evaluate.py": EvaluateConfig,
}
OPTIONS |= {"hellaswag.py": HellaSwagConfig, "export.py": ExportConfig}


def anchors(page) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_config_files_and_options_that_exist(page):
    text = page.read_text().replace("\\\n", " ")
    for script, rest in re.findall(r"\b((?:[\w/]+/)?\w+\.py)\b((?: +[^\s`#|]+)*)", text):
        if script == "mine.py" or not re.search(rf"(python|torchrun|sbatch)[^\n`]* {script}", text):
            continue
        assert (ROOT / script).is_file(), script
        assert all(
            (ROOT / config).is_file() for config in re.findall(r"config/(?!mine)[\w/]+\.py", rest)
        ), rest
        if options := OPTIONS.get(script):
            assert set(re.findall(r"--(\w+)", rest)) <= flat_fields(options).keys() | {"help"}, (
                script,
                rest,
            )
