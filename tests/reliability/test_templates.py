"""Chat templates: what may take for ever or make more than fits is refused, all others render as
transformers renders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tyir.tools.run import rendering
from tyir.tools.run.rendering import LimitError, render

MODELS = Path(__file__).parents[1] / "models"
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.", "name": None},
    {"role": "user", "content": "  Why? <|im_end|> é 'q'  "},
    {"role": "assistant", "reasoning_content": "hm", "content": "So."},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": ["<", 1.5, None, True]}}}]
DOUBLED = "{{% set n = namespace(x={0}) %}}{{% for i in range(60) %}}{1}{{% endfor %}}{{{{ n.x }}}}"

LARGE = (
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * [1] }}",
    "{{ 2 ** 1000000000 }}",
    DOUBLED.format("'a'", "{% set n.x = n.x + n.x %}"),
    DOUBLED.format("'a'", "{% set n.x = n.x ~ n.x %}"),
    DOUBLED.format("'a'", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    DOUBLED.format("[1]", "{% set n.x = [n.x, n.x] %}"),
    DOUBLED.format("(1,)", "{% set n.x = (n.x, n.x) %}"),
    DOUBLED.format("1", "{% set n.x = dict(a=n.x, b=n.x) %}"),
    DOUBLED.format("1", "{% set n.x = {'a': n.x, 'b': [n.x]} %}"),
    "{% set n = namespace() %}{% set n.x = [n, n] %}{{ n }}",
    "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1, 2) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('x' * 10000).replace('x', 'y' * 10000) }}",
    "{{ ('x' * 10000) | replace('x', 'y' * 10000) }}",
    "{{ ('y' * 100000).join('x' * 100000) }}",
    "{{ range(100000) | join('x' * 100000) }}",
    "{{ range(100000) | map('string') | map('center', 100000) | join }}",
    "{{ 1.5 | round(10**9) }}",
    "{{ (1).to_bytes(10**10) }}",
    "{{ ('b' * 1000000 + 'a' * 4000000).rfind('c' + 'a' * 2000000) }}",
    "{{ range(100000) | batch(2) | list | sum(start=[]) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ messages }}" + " " * (1 << 18),
)
LONG = (
    "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% for a in range(100000) if range(100000) | list | length %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in range(50) recursive %}{% if loop.depth < 50 %}{{ loop(range(50)) }}{% endif %}{% endfor %}",
    "{{ range(100000) | map('string') | map('upper') | map('lower') | map('title') | select | list }}" * 100,
)
SAME: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m.content | trim }}\n{% endfor %}", {}),
    ("{% for m in messages %}\n  {%- if loop.first %}[{{ m.name is defined }}]{% endif %}\n"
     "  {%- generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}", {}),
    ("{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ messages }}", {"tools": TOOLS}),
    ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ enable_thinking }}",
     {"enable_thinking": False}),
    ("{% set ns = namespace(n=0, all=[]) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}"
     "{% set ns.all = ns.all + [m.content ~ ns.n] %}{% if m.thinking %}{{ m.reasoning_content }}"
     "{% endif %}{% endfor %}{{ ns.all | join(', ') }}{{ ns.n * 2 ** 3 % 5 }}{{ -ns.n }}", {}),
    ("{% macro say(m, n=2) %}{{ m.content.split()[-1].strip('?') * n }}{% endmacro %}"
     "{% for m in messages if m.role != 'system' %}{{ say(m) }}{% if loop.last %}{% break %}{% endif %}"
     "{% endfor %}{% macro box() %}({{ caller() }}){% endmacro %}{% call box() %}in{% endcall %}", {}),
    ("{{ messages | map(attribute='role') | unique | list }}{{ messages | selectattr('role', 'equalto',"
     " 'user') | list | length }}{{ '%s=%03d' | format('a', 7) }}{{ '{:>5}'.format('b') }}"
     "{{ dict(a=1, **{'b': 2}) | items | list }}{{ 'a,b'.replace(',', ';').split(';') }}"
     "{{ [1, [2, 3]] | string | indent(4, true) }}{{ 2.345 | round(2) }}{{ (1, 2) }}{{ unknown }}", {}),
    ("{% filter upper %}{{ messages[1].content | replace('W', 'w') | e }}{% endfilter %}"
     "{% set x %}a{{ x }}b{% endset %}{{ x }}{{ cycler('a', 'b').next() }}{{ range(3) | list }}", {}),
    ("{%- for key, value in messages[0].items() %}{{ key }}: {{ value }}\n{%- endfor %}"
     "{{ 'yes' if 'user' in messages | map(attribute='role') else 'no' }}"
     "{% if not (1, 2) is mapping %}t{% endif %}",
     {}),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "tiny-qwen2")


@pytest.mark.parametrize("template", LARGE)
def test_a_value_that_is_too_large(template: str) -> None:
    with pytest.raises(LimitError):
        render(template, ASKED, {})


@pytest.mark.parametrize("template", LONG)
def test_a_template_that_takes_too_long(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_SECONDS", 0.3)
    with pytest.raises(LimitError, match=r"more than the 0\.3 seconds"):
        render(template, ASKED, {})


@pytest.mark.parametrize(("template", "given"), SAME)
def test_others_are_rendered_as_transformers_does(
    template: str, given: Mapping[str, Any], tokenizer: Any
) -> None:
    wanted = tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False, **given)
    variables = {**tokenizer.special_tokens_map, **given}
    assert render(template, TALK, variables, add_generation_prompt=False) == wanted


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/chat_template.jinja")), ids=lambda p: p.parent.name)
def test_templates_of_models(path: Path, tokenizer: Any) -> None:
    template = path.read_text()
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    for messages in (TALK[1:2], parts):
        wanted = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert render(template, messages, tokenizer.special_tokens_map) == wanted


@pytest.mark.parametrize("said", ["And then", [{"type": "text", "text": "And then "}]])
def test_a_message_that_goes_on(said: Any, tokenizer: Any) -> None:
    messages = [*ASKED, {"role": "assistant", "content": said}]
    for template in (
        "{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else m.content[0].text }};"
        "{% endfor %}",
        "{% for m in messages %}{% set c = m.content if m.content is string else m.content[0].text %}"
        "{{ c | trim }};{% endfor %}",
    ):
        wanted = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, continue_final_message=True
        )
        told = render(template, messages, {}, add_generation_prompt=False, continue_final_message=True)
        assert told == wanted
    with pytest.raises(ValueError, match="leaves out"):
        render("x", messages, {}, continue_final_message=True)


def test_the_sandbox_keeps_what_it_kept() -> None:
    """Nothing can be changed, and nothing of Python be reached."""
    from jinja2.exceptions import SecurityError

    for template in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__class__.x }}",
    ):
        with pytest.raises(SecurityError):
            render(template, ASKED, {})
    with pytest.raises(Exception, match="no such role"):
        render("{{ raise_exception('no such role') }}", ASKED, {})
