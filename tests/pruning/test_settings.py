"""What a recipe may say about pruning, and how it is told what it may not."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import parse_yaml
from phoenix_sparse.pruning.settings import CalibrationSettings, EvolutionSettings, SparsifySettings
from phoenix_sparse.recipe import check

KINDS = "use uniform, owl, alphapruning, evolutionary, a sparsity by pattern of layer names such as"


def read(text):
    """Settings from YAML, as a recipe has them."""
    return check(SparsifySettings, parse_yaml(text) or {}, "recipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # one field
        ("sparsity: 1", "sparsity=1 should be less than 1"),
        ("sparsity: -0.1", "sparsity=-0.1 should be greater than or equal to 0"),
        ("sparsity: .nan", "sparsity=nan should be a finite number"),
        ("importance: wand", "importance='wand': 'wand' is not known; use one of gblm, gradient, magnitude, random"),
        ("importance: 3", "importance=3 should be a valid string"),
        ("update: obs", "update='obs' should be 'none', 'dsnot', 'sparsegpt' or 'alps'"),
        ("pattern: 2;4", "pattern='2;4': '2;4' is no pattern; use unstructured, N:M with N < M (2:4: keep 2 of 4)"),
        ("pattern: '4:4'", "pattern='4:4': '4:4' is no pattern"),
        ("pattern: 4:2", "pattern='4:2': '4:2' is no pattern; use unstructured, N:M with N < M"),
        ("pattern: 242", "pattern=242 should be a valid string"),
        ("pattern: 5", "pattern=5 should be a valid string"),
        ("group: column", "group='column' should be 'row', 'layer' or 'global'"),
        ("block: 16", "block is no field; "),
        # allocations
        ("allocation: owll", f"allocation='owll': {KINDS}"),
        ("allocation:", f"allocation=(empty): {KINDS}"),
        ("allocation: 0.5", f"allocation=0.5: {KINDS}"),
        ("allocation: true", f"allocation=True: {KINDS}"),
        ("allocation: [0.5, 1.0]", "'block 1' is given 1.0; a sparsity is from 0 to below 1"),
        ("allocation: [0.5, a]", f"'block 1' is given 'a'; {KINDS}"),
        ("allocation: [true]", "'block 0' is given True; "),
        ("allocation: [.nan]", "'block 0' is given nan; a sparsity is from 0 to below 1"),
        ("allocation: {'*.o_proj': -0.1}", "allocation: '*.o_proj' is given -0.1; a sparsity is from 0 to below 1"),
        ("allocation: {'*.o_proj': low}", f"allocation: '*.o_proj' is given 'low'; {KINDS}"),
        ("allocation: {0: 0.5}", f"allocation: 0 is given 0.5; {KINDS}"),
        # the search
        ("evolution: {sequences: [4, 2, 1]}", "evolution.sequences=[4, 2, 1]: needs three rising numbers from 1 up"),
        ("evolution: {sequences: [0, 2, 3]}", "needs three rising numbers from 1 up, such as [4, 16, 64]"),
        ("evolution: {sequences: [4, 16]}", "evolution.sequences=[4, 16]: needs three rising numbers"),
        ("evolution: {sequences: 4}", "evolution.sequences=4: needs three rising numbers"),
        ("evolution: {sequences: [1, 2, 3.5]}", "needs three rising numbers"),
        ("evolution: {budget: 0}", "evolution.budget=0 should be greater than or equal to 1"),
        ("evolution: {fitness: accuracy}", "evolution.fitness='accuracy' should be 'kl' or 'loss'"),
        # calibration
        ("calibration: {source: text}", "calibration.source: text needs text: FILE, and source: task takes none"),
        ("calibration: {text: a.txt}", "calibration.source: text needs text: FILE, and source: task takes none"),
        ("calibration: {samples: 0}", "calibration.samples=0 should be greater than or equal to 1"),
        ("calibration: {length: 7}", "calibration.length=7 should be greater than or equal to 8"),
        # fields that don't go together
        ("{pattern: '2:4', sparsity: 0.6}", "pattern: 2:4 is sparsity 0.5; set sparsity to that"),
        ("{pattern: '1:4'}", "pattern: 1:4 is sparsity 0.75; set sparsity to that"),
        ("{pattern: '2:4', group: row}", "group: the pattern 2:4 has its own; leave group out"),
        ("{pattern: 16x1, group: layer}", "group: the pattern 16x1 has its own; leave group out"),
        ("{pattern: structured, group: global}", "group: the pattern structured has its own; leave group out"),
        ("{pattern: '2:4', allocation: owl}", "allocation: the pattern 2:4 gives each layer its share; leave owl out"),
        ("{pattern: structured, allocation: [0.5, 0.5]}", "allocation: the pattern structured gives each layer"),
        ("{pattern: structured, allocation: {'*': 0.5}}", "allocation: the pattern structured gives each layer"),
        ("{pattern: 16x1, update: dsnot}", "update: dsnot works with unstructured and N:M patterns; leave dsnot out"),
        ("{pattern: structured, update: alps}", "update: alps works with unstructured and N:M patterns"),
        ("{group: global, update: dsnot}", "group: global shares out by one threshold; leave group out, or dsnot"),
        ("{group: global, update: sparsegpt}", "group: global shares out by one threshold"),
        ("{group: global, allocation: owl}", "group: global shares out by one threshold"),
        (
            "{group: row, update: sparsegpt}",
            "group: sparsegpt compares in its own way; leave group out, or sparsegpt",
        ),
        ("{group: layer, update: alps}", "group: alps compares in its own way; leave group out"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_right(text, message):
    with pytest.raises(PhoenixError) as error:
        read(text)
    assert str(error.value).startswith("recipe: ")
    assert message in str(error.value)
    assert str(error.value).count("allocation") <= 2  # not once for each kind of allocation


@pytest.mark.parametrize(
    ("text", "allocation"),
    [
        ("", "uniform"),
        ("allocation: evolutionary", "evolutionary"),
        ("allocation: {'*.o_proj': 0.4, 'model.layers.0.*': 0}", {"*.o_proj": 0.4, "model.layers.0.*": 0.0}),
        ("allocation: [0.4, 0.6]", (0.4, 0.6)),
        ("allocation: [0]", (0.0,)),
    ],
)
def test_allocations_are_read_and_written_again(text, allocation):
    settings = read(text)
    assert settings.allocation == allocation
    assert type(settings.allocation) is type(allocation)
    again = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))
    assert check(SparsifySettings, again, "recipe") == settings


@pytest.mark.parametrize(
    ("written", "pattern", "sparsity"),
    [
        ("2:4", "2:4", 0.5),
        ("'2:4'", "2:4", 0.5),
        ("4:8", "4:8", 0.5),
        ("16:32", "16:32", 0.5),
        ("1:64", "1:64", 0.984375),
        ("64:128", "64:128", 0.5),
    ],
)
def test_n_of_m_needs_no_quotes(written, pattern, sparsity):
    """YAML 1.1 reads 2:4 as the number 124 of base 60, and 64:128 as a text."""
    settings = read(f"pattern: {written}\nsparsity: {sparsity}")
    assert settings.pattern == pattern
    again = parse_yaml(yaml.safe_dump(settings.model_dump(mode="json")))
    assert check(SparsifySettings, again, "recipe") == settings


NAMED = st.fixed_dictionaries(
    {},
    optional={
        "importance": st.sampled_from(["wanda", "magnitude", "taylor"]),
        "update": st.sampled_from(["none", "dsnot", "sparsegpt", "alps"]),
        "group": st.sampled_from([None, "row", "layer", "global"]),
        "pattern": st.sampled_from(["unstructured", "2:4", "16x1", "structured"]),
        "allocation": st.sampled_from(["uniform", "owl", "evolutionary"]),
        "sparsity": st.just(0.5),
        "calibration": st.just({"samples": 3}),
    },
)


@given(named=NAMED)
def test_sparsegpt_prunes_where_nothing_else_is_asked_for(named):
    """And a dump, which names everything, is read as what it was dumped from."""
    try:
        settings = check(SparsifySettings, named, "recipe")
    except PhoenixError:
        # What was named doesn't go together; what was left out is never what is wrong.
        with pytest.raises(PhoenixError):
            check(SparsifySettings, {"update": "none"} | named, "recipe")
        return
    others = "importance" in named or named.get("group") or named.get("pattern") in ("16x1", "structured")
    assert settings.update == named.get("update", "none" if others else "sparsegpt")
    assert settings.importance == named.get("importance", "wanda")
    dumped = settings.model_dump(mode="json")
    assert (dumped["update"], dumped["importance"]) == (settings.update, settings.importance)
    assert check(SparsifySettings, parse_yaml(yaml.safe_dump(dumped)), "recipe") == settings
    assert SparsifySettings(**named) == settings


@pytest.mark.parametrize("pattern", ["", "2;4", "4:2", "16x", None, 16, ["2:4"]])
@pytest.mark.parametrize("more", [{}, {"importance": "wanda"}])
def test_a_wrong_pattern_is_told_as_such_whatever_prunes(pattern, more):
    with pytest.raises(PhoenixError, match="^recipe: pattern=") as error:
        check(SparsifySettings, {"pattern": pattern} | more, "recipe")
    assert "update" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("", "layer"),
        ("importance: wanda", "row"),
        ("importance: ria", "layer"),
        ("importance: gblm", "row"),
        ("importance: taylor", "layer"),
        ("importance: magnitude", "layer"),
        ("{importance: magnitude, group: row}", "row"),
        ("{importance: wanda, group: global}", "global"),
        ("pattern: 2:4", "layer"),
        ("pattern: 16x1", "layer"),
        ("pattern: structured", "layer"),
        ("update: dsnot", "row"),
        ("update: sparsegpt", "layer"),
        ("update: alps", "layer"),
    ],
)
def test_the_comparison_group_follows_the_method(text, group):
    assert read(text).comparison_group == group


@pytest.mark.parametrize(
    ("text", "tokens", "gradients"),
    [
        ("importance: magnitude", False, False),
        ("importance: random", False, False),
        ("importance: wanda", True, False),
        ("importance: gradient", False, True),
        ("importance: taylor", False, True),
        ("importance: gblm", True, True),
        ("{importance: magnitude, update: dsnot}", True, False),
        ("{importance: taylor, update: dsnot}", True, True),
        ("{importance: taylor, update: sparsegpt}", True, False),
        ("{importance: taylor, update: alps}", True, False),
        ("{importance: taylor, update: alps, allocation: evolutionary}", True, True),
        ("{importance: magnitude, allocation: owl}", True, False),
        ("{importance: magnitude, allocation: alphapruning}", False, False),
        ("{importance: magnitude, allocation: evolutionary}", True, False),
        ("{importance: magnitude, allocation: [0.5, 0.5]}", False, False),
    ],
)
def test_only_what_is_needed_is_measured(text, tokens, gradients):
    settings = read(text)
    assert (settings.reads_tokens, settings.reads_gradients) == (tokens, gradients)


def test_settings_never_change():
    for settings, field in (
        (SparsifySettings(), "sparsity"),
        (EvolutionSettings(), "budget"),
        (CalibrationSettings(), "samples"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(settings, field, 0.4)
