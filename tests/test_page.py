"""The page of elfplot.py: what is in it, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Iterator

import pytest

from browser import PROGRAM, Browser
from test_plot import (
    EXTREMES,
    HOSTILE,
    MS,
    REPORT,
    data_of,
    elfplot,
    many_destinations,
    page_of,
    probes_in,
    regular,
    row,
    text_of,
)  # fmt: skip

if not elfplot.MISSING:
    from elf import page as page_module


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return tmp_path / 'run 5.csv'


class Tags(HTMLParser):
    """The tags of a page, and the texts in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and data.strip():
            self.texts.setdefault(self.tags[-1][0], []).append(data)


@pytest.mark.sample
def test_page(csv: Path) -> None:
    csv.write_text(text_of(regular() + [row(1.0005, 2, None, srtt=2500, retrans=0), row(2, 1, 1.1, retrans=3)]))
    [section] = page_of(str(csv))['sections']
    its = {kind: [each for each in section['series'] if each['kind'] == kind] for kind in ('answers', 'unanswered')}
    assert [(each['hop'], each['name']) for each in its['answers']] == [
        (hop, f'10.0.{hop}.2') for hop in (1, 2, 3, 4)
    ]
    assert [(each['hop'], [count for _, _, count in each['counts']]) for each in its['unanswered']] == [(2, [1])]
    assert [[hop, probes, answered] for hop, probes, answered, *_ in section['hops']] == [
        [1, 51, 51], [2, 51, 50], [3, 50, 50], [4, 50, 50],
    ]  # fmt: skip
    assert section['percent'] == 1 and section['hops'][2][3:8] == [3, 3.24, 3.47, 3.49, 3.49]
    for each in its['answers']:
        found = [math.exp(step * section['step']) / MS for _, step, count in each['counts'] for _ in range(count)]
        expected = [each['hop'] + i / 100 for i in range(50)]
        assert sorted(found)[:50] == pytest.approx(sorted(expected + [1.1] * (each['hop'] == 1))[:50], rel=0.01)
    flows = [(each['name'], sum(count for _, _, count in each['counts'])) for each in section['series'][-2:]]
    assert flows == [('TCP 40112 to 443', 1), ('TCP 40112 to 443', 3)]


def test_page_loads_and_runs_nothing_else(csv: Path) -> None:
    csv.write_text(text_of(EXTREMES['hostile']))
    data = page_of(str(csv))
    page = csv.with_suffix('.html').read_text()
    tags = Tags(page)
    assert [tag for tag, _ in tags.tags] == [
        'html', 'head', 'meta', 'title', 'meta', 'meta', 'style', 'body', 'h1', 'noscript', 'p', 'main', 'script',
        'script',
    ]  # fmt: skip
    text, script = tags.texts['script']
    assert '<' not in text and HOSTILE[:40] in json.dumps(data)
    (policy,) = (str(attributes['content']) for _, attributes in tags.tags if 'http-equiv' in attributes)
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    for name, content in ('script', script), ('style', tags.texts['style'][0]):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not re.findall(r'(?:https?:|@import|url\((?!#))', re.sub('http://www.w3.org/2000/svg', '', page))
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith('on')]


def test_page_that_must_be_small(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is less exact, as it says; what is counted stays."""
    chance = random.Random(1)
    rows = [
        row(number / 20, 1 + number % 3, chance.expovariate(0.1) + 0.5, dest=f'10.9.0.{number % 4}')
        for number in range(6000)
    ]
    csv.write_text(text_of(rows))
    whole = page_of(str(csv))['sections']
    size = csv.with_suffix('.html').stat().st_size
    counts = sum(len(section['data']) for section in whole)
    monkeypatch.setattr(page_module, 'SIZE_MAX', size - counts // 2)
    small = page_of(str(csv))['sections']
    assert csv.with_suffix('.html').stat().st_size <= size - counts // 2
    for before, after in zip(whole, small):
        assert probes_in(before) == probes_in(after) and before['hops'] == after['hops']
        assert after['width'] > before['width'] and after['percent'] >= before['percent'] == 1
        for exact, rounded in zip(before['series'], after['series']):
            medians = []
            for section, each in (before, exact), (after, rounded):
                steps = sorted(step for _, step, count in each['counts'] for _ in range(count))
                medians.append(math.exp(steps[(len(steps) - 1) // 2] * section['step']))
            assert medians[1] == pytest.approx(medians[0], rel=(after['percent'] + 1) / 100)
    monkeypatch.setattr(page_module, 'SIZE_MAX', size - counts)
    least = page_of(str(csv))['sections']
    assert csv.with_suffix('.html').stat().st_size <= size - counts
    assert [section['dest'] for section in least] == [section['dest'] for section in whole]


# In a browser

HOPS, SECONDS, OUTAGE = 30, 60, (20, 29)


def a_run(csv: Path) -> str:
    """Thirty hops that answer after as many ms, and one that does not for a while; two flows of TCP. Its URL."""
    rows = [
        row(0.2 * i + 0.005 * hop, hop, None if hop == 3 and OUTAGE[0] <= 0.2 * i < OUTAGE[1] else hop,
            sport=40000 + i % 2, srtt=1000 * HOPS + 5000 * (i % 2), cwnd=10, retrans=2 * (i > 250))
        for i in range(5 * SECONDS)
        for hop in range(1, HOPS + 1)
    ]  # fmt: skip
    csv.write_text(text_of(rows))
    csv.with_suffix('.json').write_text(json.dumps({**REPORT, 'ended': None}))
    page_of(str(csv))
    return csv.with_suffix('.html').resolve().as_uri()


@pytest.fixture(scope='module')
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


ROWS = (
    '[...document.querySelectorAll("section:not([hidden]) tbody tr")]'
    '.map(row => [...row.cells].map(cell => cell.textContent))'
)
SHOWN = 'document.querySelector("[role=status]").textContent'
PICTURE = 'document.querySelector(".picture > svg")'
TIP = 'document.querySelector(".tip:not([hidden])")?.textContent'


def button(text: str) -> str:
    return f'[...document.querySelectorAll("button")].find(b => b.textContent.trim() === {json.dumps(text)})'


@pytest.mark.needs(PROGRAM)
@pytest.mark.parametrize('width', [1280, 420])
def test_page_in_a_browser(width: int, browser: Browser, csv: Path) -> None:
    browser.open(a_run(csv), width)
    [section] = data_of(csv.with_suffix('.html').read_text())['sections']
    assert browser.run('document.documentElement.scrollWidth <= innerWidth')
    assert browser.run('document.querySelectorAll("h1").length') == 1
    whole = browser.run(ROWS)
    assert [cells[:3] for cells in whole] == [
        [str(hop), '300', '85.0%' if hop == 3 else '100.0%'] for hop in range(1, HOPS + 1)
    ]
    assert [float(cells[4]) for cells in whole] == list(range(1, HOPS + 1))
    looks = browser.run(
        '[...document.querySelectorAll(".legend button:not(.plain) path")].map('
        'p => p.getAttribute("stroke") + p.getAttribute("stroke-dasharray"))'
    )
    assert len(set(looks[:HOPS])) == HOPS == len(looks) - 2

    # Hovering shows the figures of the line below the pointer.
    left, top, wide, high = browser.place(PICTURE)
    line = browser.run(f'{PICTURE}.querySelectorAll(".line")[6].getBoundingClientRect().toJSON()')
    browser.mouse('Moved', left + wide * 0.8, line['y'] + line['height'] / 2)
    tip = browser.run(TIP)
    assert (
        '10.0.7.2: median ' in tip and '2026-11-06 21:24:' in tip and re.search(r'hop 7: \d+ probes?, 0 unans', tip)
    )
    median = float(re.findall(r'median (\S+) ms', tip)[0])
    assert median == pytest.approx(7, rel=0.012)

    # Drawing over a part of the time zooms, and figures follow.
    browser.mouse('Pressed', left + wide * 0.3, top + 100, pressed=True)
    for part in 0.4, 0.5, 0.6:
        browser.mouse('Moved', left + wide * part, top + 100, pressed=True)
    browser.mouse('Released', left + wide * 0.6, top + 100)
    begin, end = (
        sum(float(n) * s for n, s in zip(text.split(':'), (3600, 60, 1))) - (21 * 3600 + 23 * 60 + 20)
        for text in re.findall(r'\d\d:\d\d:\d\d\.\d+', browser.run(SHOWN))
    )
    assert 10 < begin < end < 42 and end - begin > 10
    first, last = (
        section['start'] + function((at - section['start']) / section['width']) * section['width']
        for function, at in ((math.floor, begin), (math.ceil, end))
    )
    hop3 = [i for i in range(5 * SECONDS) if first <= 0.2 * i + 0.015 < last]
    answered = [i for i in hop3 if not OUTAGE[0] <= 0.2 * i < OUTAGE[1]]
    zoomed = browser.run(ROWS)
    assert abs(int(zoomed[2][1]) - len(hop3)) <= 2  # the text rounds the ends
    assert abs(float(zoomed[2][2].strip('%')) - 100 * len(answered) / len(hop3)) < 3
    assert float(zoomed[2][4]) == pytest.approx(3, rel=0.01)

    # A finding is a span that leads to its place.
    browser.click(button('Whole time'))
    assert browser.run(SHOWN) == 'The whole time is shown.' and browser.run(ROWS) == whole
    browser.click('document.querySelector(".findings button")')
    shown = re.findall(r'21:23:(\d\d)', browser.run(SHOWN))
    assert 20 <= int(shown[0]) < 40 < 48 <= int(shown[1])
    assert browser.run('document.querySelectorAll(".span").length') == 1

    # The legend switches hops and flows.
    count = f'{PICTURE}.querySelectorAll(".line").length'
    assert browser.run(count) == HOPS + 2
    browser.click('document.querySelectorAll(".legend button")[4]')
    assert browser.run(count) == HOPS + 1
    assert browser.run('document.querySelectorAll(".legend [aria-pressed=false]").length') == 1
    browser.click(button('none'))
    browser.click(button('TCP 40001 to 443'))
    assert browser.run(count) == 1
    browser.click(button('all'))
    assert browser.run(count) == HOPS + 2

    # Keys do the same.
    browser.run('document.activeElement.blur()')
    for _ in range(60):
        browser.key('Tab')
        if browser.run('document.activeElement.getAttribute("role")') == 'application':
            break
    assert browser.run('getComputedStyle(document.activeElement).outlineStyle') != 'none'
    for key in '0', 'ArrowRight', 'ArrowDown':
        browser.key(key)
    assert '10.0.2.2: median ' in browser.run(TIP)
    assert '10.0.2.2: median ' in browser.run('document.querySelector("[aria-live]").textContent')
    browser.key('+')
    assert browser.run(SHOWN).startswith('Shown: ')
    browser.key('0')
    assert browser.run(SHOWN) == 'The whole time is shown.'

    # The table sorts.
    head = '[...document.querySelectorAll("section th button")].find(b => b.textContent === "median")'
    browser.click(head)
    browser.click(head)
    assert browser.run(f'{head}.closest("th").getAttribute("aria-sort")') == 'descending'
    assert [int(cells[0]) for cells in browser.run(ROWS)] == list(range(HOPS, 0, -1))

    # What a screen reader is told.
    nodes = browser.ask('Accessibility.getFullAXTree')['nodes']
    roles = [
        (node['role']['value'], node.get('name', {}).get('value', '').strip())
        for node in nodes
        if not node['ignored']
    ]
    assert not [role for role, name in roles if role in ('button', 'Canvas', 'application', 'region') and not name]
    assert ('rowheader', '30') in roles and 'table' in dict(roles) and ('button', '3 10.0.3.2') in roles

    browser.ask('Emulation.setEmulatedMedia', media='print')
    assert browser.run('getComputedStyle(document.querySelector(".controls")).display') == 'none'
    assert base64.b64decode(browser.ask('Page.printToPDF')['data']).startswith(b'%PDF')
    browser.ask('Emulation.setEmulatedMedia', media='')
    assert browser.problems == []


@pytest.mark.needs(PROGRAM)
def test_page_of_many_destinations_in_a_browser(browser: Browser, csv: Path) -> None:
    """One line each, with a small picture; details on demand. Hostile names are only text."""
    csv.write_text(text_of(many_destinations(30) + [row(0, 2, 3, dest=HOSTILE)]))
    page_of(str(csv))
    browser.open(csv.with_suffix('.html').resolve().as_uri(), 420)
    lines = '[...document.querySelectorAll("main > .scroll tbody tr")]'
    assert (
        browser.run(f'{lines}.length')
        == 31
        == browser.run(f'{lines}.filter(r => r.querySelector("svg path")).length')
    )
    assert browser.run('document.documentElement.scrollWidth <= innerWidth')
    assert browser.run('document.querySelectorAll("section:not([hidden])").length') == 1
    browser.click(button('10.9.0.9'))
    assert browser.run('document.activeElement.textContent') == '10.9.0.9'
    assert browser.run(ROWS)[-1][:3] == ['1', '91', '100.0%']
    browser.click(button('destination'))
    assert browser.run(f'{lines}[0].cells[0].textContent').startswith('</script>')
    assert browser.problems == []
