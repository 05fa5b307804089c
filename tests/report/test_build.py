"""The report and the card, built from a made-up run and from damaged ones."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.report import build_report
from report.conftest import answers

Write = Callable[[dict[str, Any]], Path]
HOSTILE = "</script><img src=x onerror=alert(1)>'\"`|${7*7}{{ 7*7 }} $x^2$ \\"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The page's tags, attributes and text; fails where tags don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_shows_what_was_measured(files: dict[str, Any], write_run: Write) -> None:
    directory = write_run(files)
    path = build_report(directory)
    assert path == directory / "report.html"
    text = read(path).text
    for expected in ("41.2% ± 1.4", "12.0% ± 0.9", "42.5% ± 1.4", "3.2% ± 0.5", "1.9e-06", "21.34", "50.12%"):
        assert expected in text
    for expected in ("b" * 64, "c" * 64, "d" * 64, "finetune.learning_rate", "0.0003", "Some CPU @ 2.1 GHz", "5.23.0"):
        assert expected in text
    assert "30 min 35 s" in text
    assert "none is non-zero" in text
    card = (directory / "README.md").read_text()
    for expected in ("41.2% ± 1.4", "42.5% ± 1.4", "50.12%", "learning_rate: 0.0003"):
        assert expected in card
    for expected in ("Pruned to 50.00%", "update alps, pattern 2:4, allocation owl"):
        assert expected in card
    assert "pruned to 50.0% overall: update alps, pattern 2:4, allocation owl" in text


def test_needs_no_network_and_no_scripts(files: dict[str, Any], write_run: Write) -> None:
    page = read(build_report(write_run(files)))
    assert page.names().isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert (value or "").startswith("#")
    style = path_text = (write_run(files) / "report.html").read_text()
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", path_text))


def test_every_id_is_unique_and_every_link_has_its_target(files: dict[str, Any], write_run: Write) -> None:
    page = read(build_report(write_run(files)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            if name in attributes:
                assert (attributes[name] or "")[1:] in ids


def test_every_plot_is_described(files: dict[str, Any], write_run: Write) -> None:
    path = build_report(write_run(files))
    figures = [attributes for tag, attributes in read(path).tags if tag == "figure"]
    assert len(figures) == 4
    assert all(attributes["aria-label"] for attributes in figures)
    assert path.read_text().count("<figcaption>") == 4
    for svg in re.findall(r"<svg.*?</svg>", path.read_text(), flags=re.DOTALL):
        root = ET.fromstring(svg)
        assert root.attrib["aria-hidden"] == "true"
        # Text as text, and colours that follow the page.
        assert root.findall(".//{http://www.w3.org/2000/svg}text")
        assert not re.search(r"#0[1-6]0[2-7]0[3-8]\b", svg)


def test_is_the_same_from_the_same_files(files: dict[str, Any], write_run: Write) -> None:
    directory = write_run(files)
    first = build_report(directory).read_bytes(), (directory / "README.md").read_bytes()
    assert (build_report(directory).read_bytes(), (directory / "README.md").read_bytes()) == first
    assert not list(directory.glob(".*.tmp"))


OPTIONAL = [
    "recipe.yaml",
    "allocation.json",
    "tune.json",
    "baselines/dense_lora/tune.json",
    "search.json",
    "certificate.json",
    "eval.json",
    "baselines/dense/eval.json",
    "baselines/dense_lora/eval.json",
    "baselines/pruned/eval.json",
    "perplexity.json",
    "flops.json",
]


@pytest.mark.parametrize("missing", OPTIONAL)
def test_any_file_may_be_missing(files: dict[str, Any], write_run: Write, missing: str) -> None:
    del files[missing]
    text = read(build_report(write_run(files))).text
    if missing.endswith("eval.json"):
        assert text.count("not measured") == 3  # one accuracy; peak memory, twice
    if missing in ("certificate.json", "flops.json"):
        assert "Not measured." in text


def test_a_run_that_only_began(files: dict[str, Any], write_run: Write) -> None:
    manifest = files["manifest.json"]
    manifest |= {"inputs": {}, "stages": {"sparsify": {"status": "failed", "seconds": 1.0}}}
    directory = write_run({"manifest.json": manifest})
    page = read(build_report(directory))
    assert "Nothing has been measured in this run yet." in page.text
    assert "failed" in page.text
    assert page.text.count("not measured") == 4
    # No figure at all but those of the manifest: nothing was filled in.
    assert "svg" not in page.names()
    assert not re.search(r"\d%", page.text)
    assert "no merged model" in page.text
    card = (directory / "README.md").read_text()
    assert "no merged model" in card
    assert not re.search(r"\d%", card)


def test_says_how_to_load_a_model_that_is_there(files: dict[str, Any], write_run: Write) -> None:
    directory = write_run(files | {"merged/config.json": {}})
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in read(build_report(directory)).text
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in (directory / "README.md").read_text()


def test_a_certificate_that_does_not_hold_is_said_so(files: dict[str, Any], write_run: Write) -> None:
    files["certificate.json"] |= {"off_mask_nonzeros": 12345, "argmax_agreement": 0.99999}
    text = read(build_report(write_run(files))).text
    assert "No: 12,345 weights that the mask prunes are non-zero" in text
    assert "12,345 weights off the mask are non-zero" in text  # the headline
    assert "none is non-zero" not in text
    assert "100.00%" not in text  # 99.999 % isn't rounded up to all


def test_answers_are_shown_and_compared_one_by_one(files: dict[str, Any], write_run: Write) -> None:
    before = read(build_report(write_run(files))).text
    assert "independent samples" in before
    assert "predictions.jsonl" not in before
    for role, right in (("", 90), ("baselines/pruned/", 60)):
        files[f"{role}predictions.jsonl"] = answers(right)
    page = read(build_report(write_run(files))).text
    error = 100 * (0.125 * 0.875 / 239) ** 0.5  # 30 of 240 differ
    assert f"± {error:.1f} points" in page
    assert "what is 0 + 1?" in page
    assert "It is so." in page
    assert "All 240 are in predictions.jsonl" in page
    files["baselines/pruned/predictions.jsonl"][3]["hash"] = "another"
    assert f"± {error:.1f} points" not in read(build_report(write_run(files))).text


def test_accuracies_of_different_ways_are_not_compared(files: dict[str, Any], write_run: Write) -> None:
    files["baselines/dense/eval.json"]["phoenix"] |= {"examples": 100, "num_fewshot": 5}
    text = read(build_report(write_run(files))).text
    assert "can’t be compared" in text
    assert "100 examples, 5-shot" in text
    assert "The result minus" not in text
    assert "the dense base 12.0%" not in text


def put(value: Any, hostile: str) -> Any:
    """The same value with every string of it, and every free key, hostile."""
    if isinstance(value, dict):
        return {key: put(item, hostile) for key, item in value.items()}
    if isinstance(value, list):
        return [put(item, hostile) for item in value]
    return hostile if isinstance(value, str) else value


def hostile_run(files: dict[str, Any]) -> dict[str, Any]:
    files = put(files, HOSTILE)
    files["recipe.yaml"] = {HOSTILE: {HOSTILE: [HOSTILE, None]}}
    files["manifest.json"]["versions"][HOSTILE] = HOSTILE
    files["manifest.json"]["stages"][HOSTILE] = {"status": HOSTILE}
    files["search.json"]["choice"] = files["search.json"]["candidates"][0]["id"]
    for name in ("certificate.json", "allocation.json"):
        layers = files[name]["layers"]
        layers[f"model.layers.0.{HOSTILE.replace('.', '')}"] = next(iter(layers.values()))
    return files


def test_no_string_of_a_run_becomes_html(files: dict[str, Any], write_run: Write) -> None:
    page = read(build_report(write_run(hostile_run(files))))
    assert page.names().isdisjoint({"script", "img"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("onerror=alert(1)") > 10
    assert "{{ 7*7 }}" in page.text


def test_no_string_of_a_run_becomes_markdown(files: dict[str, Any], write_run: Write) -> None:
    directory = write_run(hostile_run(files))
    build_report(directory)
    card = ModelCard.load(directory / "README.md")
    assert card.data.to_dict()["model-index"][0]["name"] == HOSTILE
    # Code blocks may hold anything, so long as they end where we end them.
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.text, flags=re.DOTALL | re.MULTILINE)
    assert "```" not in outside.replace("\\`", "")
    assert not re.search(r"(?<!\\)<", outside)
    for row in re.findall(r"^\| Dense base .*$", outside, flags=re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) in (5, 6)


def test_the_card_has_the_hubs_front_matter(files: dict[str, Any], write_run: Write) -> None:
    directory = write_run(files)
    build_report(directory)
    data = ModelCard.load(directory / "README.md").data
    assert data.base_model == "some-owner/base-65m"
    assert data.library_name == "transformers"
    result = data.eval_results[0]
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (0.4117, "sums", "test")


def test_a_local_path_is_not_published(files: dict[str, Any], write_run: Write) -> None:
    files["manifest.json"]["inputs"]["model"]["path"] = "/home/someone/secret/base-65m"
    del files["recipe.yaml"]
    directory = write_run(files)
    assert "secret" not in build_report(directory).read_text()
    assert "secret" not in (directory / "README.md").read_text()
    assert "base-65m" in (directory / "README.md").read_text()
    assert ModelCard.load(directory / "README.md").data.base_model is None


@pytest.mark.parametrize(("path", "published"), [("demo", None), ("a/b", "a/b"), ("../a/b", None), ("C:\\\\a/b", None)])
def test_only_a_hub_name_is_a_base_model(
    files: dict[str, Any], write_run: Write, path: str, published: str | None
) -> None:
    files["manifest.json"]["inputs"]["model"]["path"] = path
    directory = write_run(files)
    build_report(directory)
    assert ModelCard.load(directory / "README.md").data.base_model == published


def test_a_resumed_training_is_said_so(files: dict[str, Any], write_run: Write) -> None:
    files["tune.json"]["resumed_from"] = 40
    assert "taken up again after step 40" in read(build_report(write_run(files))).text


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", lambda value: value.pop("name"), r"manifest\.json: name: Field required"),
        ("eval.json", lambda value: value["phoenix"].update(accuracy=41.2), r"eval\.json: accuracy"),
        ("eval.json", lambda value: value.pop("phoenix"), "no 'phoenix' in it"),
        ("certificate.json", lambda value: value.update(max_abs_logit_difference=float("nan")), "max_abs_logit"),
        ("search.json", lambda value: value.update(choice="nobody"), "candidate 'nobody'"),
        ("search.json", lambda value: value.update(candidates=[]), "isn't listed"),
        ("perplexity.json", lambda value: value.pop("tokens"), r"perplexity\.json: tokens"),
        ("flops.json", lambda value: value["decode"].pop("total"), r"decode\.total: Field required"),
        ("allocation.json", lambda value: value.update(layers=[]), "layers"),
    ],
)
def test_a_damaged_file_is_named(files: dict[str, Any], write_run: Write, name: str, damage: Any, message: str) -> None:
    damage(files[name])
    directory = write_run(files)
    with pytest.raises(PhoenixError, match=message):
        build_report(directory)
    assert not (directory / "report.html").exists()
    assert not (directory / "README.md").exists()


@pytest.mark.parametrize("name", ["manifest.json", "tune.json", "recipe.yaml"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b""])
def test_a_file_that_is_no_file_of_a_run(files: dict[str, Any], write_run: Write, name: str, content: bytes) -> None:
    directory = write_run(files)
    (directory / name).write_bytes(content)
    with pytest.raises(PhoenixError, match=re.escape(name)):
        build_report(directory)


def test_not_a_run_directory(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PhoenixError, match="give a run directory"):
            build_report(place)


def test_stages_stand_in_the_order_in_which_they_began(files: dict[str, Any], write_run: Write) -> None:
    files["manifest.json"]["stages"] = {
        "alast": {"status": "done", "seconds": 1.0, "begun": "2026-11-21T10:00:02.000+00:00"},
        "zfirst": {"status": "done", "seconds": 1.0, "begun": "2026-11-21T10:00:01.000+00:00"},
    }
    text = read(build_report(write_run(files))).text
    assert text.index("zfirst") < text.index("alast")


def test_several_tasks_stand_in_one_table(files: dict[str, Any], write_run: Write) -> None:
    own = files["eval.json"]["phoenix"]
    other = own | {"task": "piqa", "metric": "acc,none", "accuracy": 0.625, "stderr": 0.0125}
    files["eval_all.json"] = {"tasks": {own["task"]: own, "piqa": other}, "mean_accuracy": 0.4321}
    run = write_run(files)
    build_report(run)
    page = read(run / "report.html")
    assert "All tasks, accuracy in %" in page.text
    assert "piqa acc, none" in page.text
    assert "62.5% ± 1.2" in page.text
    assert "Mean 43.2%" in page.text


def test_projections_are_labelled(files: dict[str, Any], write_run: Write) -> None:
    rate = {"tokens_per_second": 317.0, "bound": "memory"}
    row = {"system": "H200", "batch": 1, "projected": True, "dense": {"prefill": rate, "decode": rate}, "packed": None}
    files["flops.json"]["projected"] = {"note": "Projected, not measured: a roof.", "rows": [row]}
    run = write_run(files)
    build_report(run)
    page = read(run / "report.html")
    assert "Projected tokens a second on other machines (not measured)" in page.text
    assert "H200 1 317 does not fit 317 does not fit" in page.text
    assert "Projected, not measured: a roof." in page.text


def test_the_kept_step_of_a_validated_training_is_told(files: dict[str, Any], write_run: Write) -> None:
    curve = [{"step": 10, "loss": 1.5}, {"step": 20, "loss": 1.25}, {"step": 30, "loss": 1.375}]
    files["tune.json"]["validation"] = {"curve": curve, "best_step": 20, "stopped_early": True, "examples": 64}
    run = write_run(files)
    build_report(run)
    assert (
        "validated 3 times on 64 examples; kept are the weights after step 20, with a loss of 1.2500; stopped early."
        in read(run / "report.html").text
    )
