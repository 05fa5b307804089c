import pytest

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.tasks.templates import check_template, template_fields


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("Question: {{question}}\nAnswer:", {"question"}),
        ("{{passage}} {{ question | trim }}", {"passage", "question"}),
        ("{{choices[label]}}", {"choices", "label"}),
        ("label", {"label"}),
        ("just text", set()),
        (["no", "yes"], set()),
        (None, set()),
    ],
)
def test_fields(template, fields):
    assert template_fields(template) == fields


@pytest.mark.parametrize(
    "template",
    [
        "Question: {{question}}\nAnswer:",
        "{{ answer.split('####')[-1].strip() }}",
        "{{ choices[label] }}",
        "{{ doc.name[0:3] ~ '!' }}",
        "{% if passage %}{{ passage }}{% endif %}{{ question | replace('a', 'b') }}",
        "{{ 'yes' if label == 1 else 'no' }}",
    ],
)
def test_plain_templates_pass(template):
    check_template(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''['__cl' ~ 'ass__'] }}",
        "{{ question | attr('__class__') }}",
        "{{ question.format(question) }}",
        "{{ cycler.init() }}",
        "{{ question() }}",
        "{% for row in range(9) %}{{ row }}{% endfor %}",
        "{% include 'secrets' %}",
        "{% set x = question.__init__ %}",
        "{{ question | map('upper') | list }}",
        "{{ unclosed",
    ],
)
def test_others_are_refused(template):
    with pytest.raises(PhoenixError, match=r"task folder may not|not a Jinja template"):
        check_template(template)
