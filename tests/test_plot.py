"""elfplot.py: made-up rows with known figures, and what of them is in the table, the picture and the page."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tracemalloc
import types
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterable, Iterator

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import elfplot
from elf import episodes
from elf.episodes import TCP, Comparisons, Snapshot, Watch, Way
from elf.histogram import LatencyHistogram
from elf.rows import NAMES as COLUMNS
from elf.rows import Record, text_of_field
from elf.summary import Flow, Summary
from elf.usage import Failure

FigureCanvasAgg: Any = None
with suppress(ImportError):
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from elf import batches, bulk, compare, course, losses, moments, slices, sources
    from elf import summary as summary_module
    from elf.groups import Groups
    from elf.sources import sources_of, utc_of_zero
if elfplot.MISSING and os.environ.get('ELFPROBE_TESTS_STRICT') != '1':
    pytest.skip(f'not installed: {", ".join(elfplot.MISSING.values())}', allow_module_level=True)

SCRIPT = Path(elfplot.__file__)
FIRST = COLUMNS[:15]
MS, S = 10**6, 10**9  # ns
START = 5000 * S
EPOCH = 1793995200 * S  # CLOCK_MONOTONIC 0 in some tests: 2026-11-06T20:00:00Z
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;$x_{$\\'


def row(at: float, hop: int, ms: float | None, **changes: Any) -> dict[str, Any]:
    """A probe's row, sent so many seconds after the start; ms: None, no answer."""
    latency, sent = -1 if ms is None else round(ms * MS), START + round(at * S)
    return {
        **dict.fromkeys(COLUMNS, ''),
        **dict(
            recvcpu=0,
            seq=7,
            origseq=9,
            latency=latency,
            sendtime=sent,
            dest='203.0.113.80',
            outttl=hop,
            recvtime=-1 if ms is None else sent + latency,
            responder='' if ms is None else f'10.0.{hop}.2',
            recvttl=64,
            sport=40112,
            dport=443,
            protocol=6,
            outipid=1,
            inipid=1,
            app='speedtest',
            pid=4127,
            srtt='',
            cwnd='',
            retrans='',
            outtos=0,
            intos=0,
            mpls='',
            ifinfo='',
        ),
        **changes,
    }


def text_of(rows: Iterable[dict[str, Any]], columns: Iterable[str] = COLUMNS) -> str:
    lines = [','.join(columns), *(','.join(str(row[name]) for name in columns) for row in rows)]
    return '\n'.join(lines) + '\n'


def regular(hops: int = 4, probes: int = 50, every: float = 0.1, **changes: Any) -> list[dict[str, Any]]:
    """So many probes to each hop; hop h answers after h to h + 0.49 ms."""
    return [
        row(every * i + 0.001 * hop, hop, hop + i % 50 / 100, **changes)
        for i in range(probes)
        for hop in range(1, hops + 1)
    ]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return tmp_path / 'run 5.csv'


def picture_of(rows: Iterable[dict[str, Any]], csv: Path, *options: str) -> elfplot.Picture:
    csv.write_text(text_of(rows))
    return picture_of_file(csv, *options)


def picture_of_file(csv: Path, *options: str) -> elfplot.Picture:
    args = elfplot.parse_arguments([*options, str(csv)])
    results, in_utc, _ = elfplot.read_all(args)
    return elfplot.draw(elfplot.choose(results, args.by, args.dest)[0], in_utc, csv.name, [], args)


def rows_of(csv: Path) -> list[Record]:
    texts = batches.Texts()
    return [record for batch in batches.read_batches(str(csv), texts) for record in batch.records()]


def page_of(*arguments: str) -> Any:
    """What the page is drawn from, each series with its counts: by bin and rounded latency."""
    assert elfplot.main(['--html', *arguments]) == 0
    return data_of(Path(arguments[-1]).with_suffix('.html').read_text())


def data_of(page: str) -> Any:
    data = json.loads(re.findall('<script type="application/json" id="data">(.*)</script>', page)[0])
    for section in data['sections']:
        numbers = iter(whole_numbers(base64.b64decode(section['data'])))
        section['series'] = [
            dict(zip(('kind', 'hop', 'name', 'rank'), each), counts=counts_from(numbers))
            for each in section['series']
        ]
        assert next(numbers, None) is None
    return data


def whole_numbers(data: bytes) -> Iterator[int]:
    value = bits = 0
    for byte in data:
        value |= (byte & 127) << bits
        bits += 7
        if byte < 128:
            yield value
            value = bits = 0


def counts_from(numbers: Iterator[int]) -> list[tuple[int, int, int]]:
    found, key = [], 0
    for _ in range(next(numbers)):
        key += next(numbers)
        found.append((key >> 11, key & 2047, next(numbers)))
    return found


def count_in(section: Any, *kinds: str) -> int:
    return sum(count for each in section['series'] if each['kind'] in kinds for _, _, count in each['counts'])


def probes_in(section: Any) -> int:
    return count_in(section, 'answers', 'unanswered')


def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith('_')}


# Arguments and errors


@pytest.mark.parametrize(
    'arguments, named',
    [
        ([], ['CSV']),
        (['--compare', 'a.csv'], ['--compare', 'two CSVs']),
        (['--last', '5', '--from', '1', 'a.csv'], ['--last', '--from']),
        (['--from', 'noon', 'a.csv'], ['--from', "'noon'", 'UTC', 'seconds']),
        (['--xlim', '1:2', 'a.csv'], ['--xlim', '--cdf']),
        (['--cdf', '--xlim', '2:1', 'a.csv'], ['--xlim', "'2:1'", 'LOW:HIGH']),
        (['--format', 'gif', 'a.csv'], ['--format', 'gif', 'svg']),
        (['--hop', '0', 'a.csv'], ['--hop', "'0'", '255']),
        (['--dest', 'nowhere', 'a.csv'], ['--dest', "'nowhere'", 'not an IPv4 or IPv6 address']),
        ([*(f'--dest=10.0.0.{i}' for i in range(17)), 'a.csv'], ['--dest', '16']),
        (['-o', '', 'a.csv'], ['-o/--filebase', 'empty']),
        (['--htm', 'a.csv'], ['--htm']),
        (['a.png'], ["'a.png'", 'overwritten', '-o']),
        (['-o', './a', 'a.html'], ["'a.html'", 'overwritten']),
    ],
    ids=lambda value: ' '.join(value)[:30],
)
def test_wrong_usage(arguments: list[str], named: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert elfplot.main(arguments) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith('elfplot.py: ') and err.count('\n') == 1
    assert not [text for text in named if text not in err]


GOOD = text_of([row(0, 1, 1)])
BAD_FILES = {  # content: what the message must name
    '': ['no whole line'],
    'recvcpu,seq': ['no whole line'],
    '\n\n': ['run 5.csv'],
    'a,b\n1,2\n': ['no column', 'latency', 'dest'],
    GOOD.replace('latency', 'delay'): ['no column latency'],
    GOOD.replace('1000000', 'soon', 1): ['not as elfprobe writes it', 'soon'],
    GOOD.replace('1000000', '', 1): ['not as elfprobe writes it'],
    GOOD.replace(str(START), '9' * 30): ['not as elfprobe writes it'],
    GOOD + 'x,' * 40 + '\n': ['not as elfprobe writes it'],
    text_of([row(0, 1, 1), row(0, 1, 1, dest='')]): ['not as elfprobe writes it', 'dest is empty in line 3'],
    text_of([row(0, 1, 1, sendtime=2**63 - 1)]): ['not as elfprobe writes it', 'sendtime is', 'line 2'],
    text_of([row(0, 1, 1, latency=-2)]): ['not as elfprobe writes it', 'latency is -2 in line 2'],
    **{
        text_of([row(0, 1, 1, srtt=value, cwnd=1)]): ['not as elfprobe writes it', 'srtt is', 'line 2']
        for value in ('1e30', 'inf', '-1')
    },
    '\0\1\2\n' * 9: ['run 5.csv'],
}


@pytest.mark.parametrize('content', BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_file(content: str, csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    csv.write_text(content)
    assert elfplot.main([str(csv)]) == 1
    out, err = capfd.readouterr()
    assert not out and err.startswith('elfplot.py: ') and err.count('\n') == 1
    assert not [text for text in (str(csv), *BAD_FILES[content]) if text not in err]
    assert list(csv.parent.iterdir()) == [csv]


def test_files_that_cannot_be_read_or_written(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert elfplot.main([str(csv)]) == elfplot.main([str(csv.parent)]) == 1
    csv.write_text(GOOD)
    assert elfplot.main(['-o', str(csv.parent / 'no' / 'x'), str(csv)]) == 1
    missing, directory, unwritable = capfd.readouterr().err.splitlines()
    assert str(csv) in missing and 'No such file' in missing
    assert str(csv.parent) in directory and 'Is a directory' in directory
    assert '-o/--filebase' in unwritable and 'no/x.png' in unwritable and 'No such file' in unwritable


@pytest.mark.parametrize(
    'redirection, said',
    [
        ('< /dev/null > /dev/full', 'cannot write the table: No space left on device'),
        ('< <(cat "$1") > /dev/null', "cannot read '/dev/stdin': not a regular file"),
    ],
    ids=['full', 'pipe'],
)
def test_files_of_another_kind(csv: Path, redirection: str, said: str) -> None:
    csv.write_text(GOOD)
    name = '/dev/stdin' if 'cat' in redirection else '$1'
    ended = subprocess.run(
        ['bash', '-c', f'"$0" "$2" "{name}" {redirection}', sys.executable, csv, SCRIPT],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert re.fullmatch(f'elfplot.py: {said}\\.?\n', ended.stderr)


def test_name_that_the_terminal_cannot_show(csv: Path) -> None:
    path = csv.with_name('é.csv')
    path.write_text(GOOD)
    ended = subprocess.run(
        [sys.executable, SCRIPT, path],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
    )
    assert (ended.returncode, ended.stderr) == (0, '')
    assert '\\xe9.png' in ended.stdout


def test_without_elfprobe_and_bcc(csv: Path, tmp_path: Path) -> None:
    """elfplot.py and elf/ are all that another machine needs."""
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(SCRIPT.with_name('elf'), tmp_path / 'elf')
    csv.write_text(GOOD)
    code = (
        'import sys; sys.modules.update(bcc=None, pyroute2=None, psutil=None)\n'
        'sys.path.insert(0, sys.argv[1]); import elfplot; sys.exit(elfplot.main(sys.argv[2:]))'
    )
    subprocess.run([sys.executable, '-c', code, str(tmp_path), str(csv)], check=True, timeout=60)
    assert csv.with_suffix('.png').exists()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(elfplot, 'MISSING', {'numpy': 'python3-numpy', 'matplotlib': 'python3-matplotlib'})
    assert elfplot.main(['a.csv']) == 1
    assert capfd.readouterr().err.endswith('apt install python3-numpy python3-matplotlib\n')


def test_reader_of_the_table_who_has_seen_enough(csv: Path) -> None:
    csv.write_text(text_of(regular()))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(SCRIPT), str(csv)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b'') and csv.with_suffix('.png').exists()


def test_names_of_what_is_written(
    csv: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    csv.write_text(GOOD)
    monkeypatch.chdir(csv.parent.parent)
    assert elfplot.main([str(csv)]) == 0
    assert sorted(path.name for path in csv.parent.iterdir()) == ['run 5.csv', 'run 5.png']
    csv.with_suffix('.png').write_text('old')
    assert elfplot.main(['--html', '-o', 'elsewhere', str(csv)]) == elfplot.main([str(csv)]) == 0
    assert {'elsewhere.png', 'elsewhere.html'} <= {path.name for path in Path().iterdir()}
    assert csv.with_suffix('.png').read_bytes().startswith(b'\x89PNG') and csv.read_text() == GOOD
    assert 'picture: elsewhere.png\npage: elsewhere.html\n' in capfd.readouterr().out


@pytest.mark.parametrize('kind', ['link', 'dangling link', 'hard link', 'pipe'])
def test_what_is_in_the_place_of_a_file(kind: str, csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder that others may write to: nothing is written through a link, and no pipe is waited for."""
    csv.write_text(GOOD)
    precious = csv.with_name('precious')
    precious.write_text('to somebody')
    for path in csv.with_suffix('.png'), csv.with_suffix('.html'), csv.with_suffix('.log'):
        if kind == 'pipe':
            os.mkfifo(path)
        elif kind == 'hard link':
            os.link(precious, path)
        else:
            path.symlink_to(precious if kind == 'link' else csv.with_name('nowhere'))
    with deadline(60):
        assert elfplot.main(['--html', str(csv)]) == 0
    assert precious.read_text() == 'to somebody' and not csv.with_name('nowhere').exists()
    for path in csv.with_suffix('.png'), csv.with_suffix('.html'):
        assert path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    assert sorted(path.suffix for path in csv.parent.iterdir()) == ['', '.csv', '.html', '.log', '.png']
    if kind == 'pipe':
        csv.unlink()
        os.mkfifo(csv)
        with deadline(60):
            assert elfplot.main([str(csv)]) == 1
        assert 'not a regular file' in capsys.readouterr().err


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """TimeoutError for what would wait for ever."""

    def raise_timeout(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Rows


@pytest.mark.parametrize('cut', [1, 2, 10, 40, 60, 100])
def test_incomplete_last_line(cut: int, csv: Path) -> None:
    rows = [row(0, 1, 1, ifinfo='"role=incoming;name=a,b"'), row(1, 2, 2, ifinfo='"role=incoming;name=c,d"')]
    csv.write_text(text_of(rows)[:-cut])
    assert [row.outttl for row in rows_of(csv)] == [1]


@pytest.mark.parametrize('columns', [FIRST, (*FIRST, 'app', 'pid'), COLUMNS[:24], (*COLUMNS, 'more')])
def test_columns_of_other_versions(columns: tuple[str, ...], csv: Path) -> None:
    rows = [dict(row, more='x', srtt=100, retrans=0) for row in regular()]
    csv.write_text(text_of(rows, columns))
    section = page_of(str(csv))['sections'][0]
    assert probes_in(section) == len(rows)
    assert count_in(section, 'srtt') == len(rows) * ('srtt' in columns)


def test_names_that_are_like_missing_values(csv: Path) -> None:
    picture = picture_of(regular(app='nan'), csv)
    assert '·  nan  ·' in picture.sections[0].title


# The table


def test_table(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [row(i, 1, 1 + i % 2) for i in range(100)] + [row(i, 2, None) for i in range(3)]
    rows += [row(i, 3, i + 1, responder=f'10.0.3.{i % 5 + 1}') for i in range(101)] + [row(5, 3, None)]
    rows += [row(0, 9, 5, dest='2001:db8::1', responder='2001:db8::9')]
    csv.write_text(text_of(rows))
    assert elfplot.main([str(csv)]) == 0
    summary = Summary()
    for one in rows:
        summary.note(Record(*(one[name] for name in Record._fields[:8])))
    summary.digest(is_over=True)
    first = min(one['sendtime'] for one in rows)
    summary.when = lambda at: f'{(at - first) / S:.1f} s'
    *lines, picture, end = capfd.readouterr().out.split('\n')
    assert lines == [*summary.tables()[1:], '']
    assert [line.split()[:5] for line in lines[2:5]] == [
        ['1', '100', '100.0%', '1.000', '1.000'],
        ['2', '3', '0.0%', 'unresponsive'],
        ['3', '102', '99.0%', '1.000', '51.000'],
    ]
    assert (picture, end) == (f'picture: {csv.with_suffix(".png")}', '')


# What is drawn


def test_bins_and_lines(csv: Path) -> None:
    picture = picture_of(regular(hops=3, probes=1000, every=0.01) + [row(5.0021, 2, None)], csv)
    section, axes = picture.sections[0], picture.panels[0].time
    assert section.width == 100 * MS  # a hundred of ten probes each
    assert (section.hops, [line.hop for line in section.lines]) == ([1, 2, 3], [1, 2, 3])
    assert section.probes.sum() == 3001 and section.probes.shape == (3, 100)
    assert [list(line) for line in section.unanswered.nonzero()] == [[1], [50]]
    drawn = lines_of(axes)
    assert list(drawn) == ['1 10.0.1.2', '2 10.0.2.2', '3 10.0.3.2']
    for hop, (label, line) in enumerate(drawn.items(), 1):
        bins = section.lines[hop - 1].bins
        expected = [
            statistics.median(hop + i % 50 / 100 for i in range(first, first + 10)) for first in range(0, 1000, 10)
        ]
        assert list(line.get_ydata()) == pytest.approx(expected), label
        assert list(bins.count) == [10] * 100
        assert list(bins.high - bins.low) == pytest.approx([45000] * 100)
        times = [0.045 + 0.1 * i + 0.001 * (hop - 1) for i in range(100)]
        assert list(line.get_xdata()) == pytest.approx(times)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == 'linear' and low == 0 and high > 3.49


@pytest.mark.parametrize('slowest, scale', [(9, 'linear'), (11, 'log'), (2000, 'log')])
def test_scale_of_latency(slowest: float, scale: str, csv: Path) -> None:
    picture = picture_of([row(0, 1, 1), row(1, 2, slowest)], csv)
    panels = picture.panels[0]
    for axes in (panels.time, panels.hops):
        low, high = axes.get_ylim()
        assert axes.get_yscale() == scale and low < 1 and high > slowest
    assert panels.time.get_ylim() == panels.hops.get_ylim()


def test_few_probes_are_points_on_the_line(csv: Path) -> None:
    picture = picture_of([row(at, 1, at + 1) for at in (0, 0.5, 1, 1.9)], csv)
    points, line = picture.panels[0].time.get_lines()
    assert sorted(points.get_xdata()) == list(line.get_xdata()) == [0, 0.5, 1, 1.9]
    assert list(line.get_ydata()) == [1, 1.5, 2, 2.9]


def test_lines_do_not_lead_across_gaps(csv: Path) -> None:
    rows = [row(0.1 * i, 1, 1) for i in (*range(50), *range(80, 130))]
    (line,) = lines_of(picture_of(rows, csv).panels[0].time).values()
    broken = [x for x, y in zip(line.get_xdata(), line.get_ydata()) if y != y]
    assert len(broken) == 1 and not any(5 < x < 8 for x in line.get_xdata())


def test_several_responders_of_a_hop(csv: Path) -> None:
    answers = [1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5]
    rows = [row(0.01 * i, 2, answers[i % 11], responder=f'10.0.2.{answers[i % 11]}') for i in range(1100)]
    drawn = lines_of(picture_of(rows, csv).panels[0].time)
    assert list(drawn) == ['2 10.0.2.1', '2 10.0.2.2', '2 10.0.2.3', '2 2 others']
    assert [statistics.median(line.get_ydata()) for line in drawn.values()] == [1, 2, 3, 4.5]
    assert len({line.get_color() for line in drawn.values()}) == 1
    assert (
        len(
            {
                str(line._dash_pattern if hasattr(line, '_dash_pattern') else line._us_dashSeq)
                for line in drawn.values()
            }
        )
        == 4
    )


def test_unresponsive_hops_and_lost_probes(csv: Path) -> None:
    rows = [
        row(0.1 * i, hop, None if hop == 2 or (hop, i) == (3, 70) else hop) for i in range(100) for hop in (1, 2, 3)
    ]
    picture = picture_of(rows, csv)
    lost = picture.panels[0].lost
    assert [label.get_text() for label in lost.get_yticklabels()] == ['2', '3']
    image = lost.get_images()[0].get_array()
    grey = image[1, 0]
    assert (image[0] != grey).any(axis=1).all()
    assert list((image[1] != grey).any(axis=1).nonzero()[0]) == [picture.sections[0].unanswered[2].argmax()]
    shown = [text.get_text() for axes in picture.figure.axes for text in axes.texts]
    assert '(unresponsive)' in shown and '300 probes, 101 unanswered' in picture.sections[0].title


def test_socket_figures(csv: Path) -> None:
    """Two flows in turn: one retransmits 3 and 4 segments, the other's ports are used by a new socket."""
    counts = [(0, 1, 5), (1, 2, 100), (2, 1, 5), (3, 2, 100), (4, 1, 8), (5, 2, 0), (6, 1, 12), (7, 2, 2)]
    rows = [row(at, 1, 1, sport=port, retrans=count, srtt=2000 + at) for at, port, count in counts]
    picture = picture_of([*rows, row(8, 1, 1)], csv)
    section, flow = picture.sections[0], picture.panels[0].flow
    per_second = {int(section.end_of(i) + 1e-6): n for i, n in enumerate(section.retrans) if n}
    assert per_second == {4: 3, 6: 4, 7: 2}
    (line,) = (line for line in flow.get_lines() if line.get_label() == 'srtt')
    assert list(line.get_ydata()) == pytest.approx([2 + 0.001 * at for at in range(8)])
    bars = [bar.get_height() for axes in picture.figure.axes for bar in axes.patches]
    assert sorted(bars) == [2, 3, 4]


def test_no_strips_without_need(csv: Path) -> None:
    panels = picture_of(regular(), csv).panels[0]
    assert panels.lost is None and panels.flow is None


@pytest.mark.parametrize('hops', [2, 4, 16, 30])
def test_colours_get_lighter_hop_by_hop(hops: int, csv: Path) -> None:
    colours = elfplot.colours_of(picture_of(regular(hops, probes=3), csv).sections[0])
    light = [
        0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 for red, green, blue, _ in colours.values()
    ]
    assert len(light) == hops and light == sorted(light) and len(set(light)) == hops
    assert light[-1] < 0.6  # visible on white


def test_many_probes_are_binned(csv: Path) -> None:
    picture = picture_of(regular(hops=2, probes=20000, every=0.001), csv)
    for line in picture.sections[0].lines:
        assert course.BINS_MAX / 3 < len(line.bins) <= course.BINS_MAX
        assert len(line.points[0]) <= course.POINTS_MAX + len(line.bins)
        assert line.points[1].max() == (line.hop + 0.49) * MS


# Time

SPANS = [0.0, 0.0005, 1.0, 8.0, 100.0, 130.0, 3600.0, 20000.0, 86400.0, 8 * 86400.0]


@pytest.mark.parametrize('span', SPANS)
@pytest.mark.parametrize('utc', [None, EPOCH + 79_123_456_789], ids=['seconds', 'utc'])
def test_ticks(span: float, utc: int | None) -> None:
    scale = elfplot.TimeScale(span, utc)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9 and (len(set(ticks.values())) == len(ticks) or span == 86400)
    assert all(scale.low <= x <= scale.high for x in ticks)
    assert scale.low < 0 and scale.high > span


def test_what_ticks_are_called() -> None:
    assert list(elfplot.TimeScale(1, None).ticks().values()) == ['0', '0.2', '0.4', '0.6', '0.8', '1']
    assert elfplot.TimeScale(1, None).label() == 'seconds since the first probe'
    assert list(elfplot.TimeScale(3600, None).ticks().values())[:3] == ['0:00', '0:10', '0:20']
    assert elfplot.TimeScale(3600, None).label() == 'hours:minutes since the first probe'
    assert elfplot.TimeScale(180, None).ticks()[30] == '0:00:30'
    second = elfplot.TimeScale(1, EPOCH + 100 * MS).ticks()
    assert list(second) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert list(second.values())[::4] == ['20:00:00.2', '20:00:01.0']
    day = elfplot.TimeScale(86400, EPOCH)
    assert day.ticks()[4 * 3600] == '2026-11-07' and day.ticks()[8 * 3600] == '04:00'
    assert day.label() == 'UTC, 2026-11-06 to 2026-11-07'


LOG = '20:20:01.123 CLOCK_MONOTONIC 0 is 2026-11-06T20:00:00.000000Z\n20:20:09.000 4 probes\n'


def zero_of(csv: Path, log: str | None, csv_written: float, log_written: float) -> tuple[int | None, str]:
    """With both files last written so many seconds after the start."""
    csv.write_text(text_of(row(at, 1, 1) for at in range(9)))
    os.utime(csv, (0, (EPOCH + START) / S + csv_written))
    if log is not None:
        csv.with_suffix('.log').write_text(log)
        os.utime(csv.with_suffix('.log'), (0, (EPOCH + START) / S + log_written))
    return utc_of_zero(batches.survey(str(csv)))


@pytest.mark.parametrize(
    'log, csv_written, log_written, known, noted',
    [
        (LOG, 8, 9, True, False),
        (LOG, 8, -5, True, False),  # it runs, or started long before
        (LOG, 8, 5000, True, False),
        (LOG, 9000, 9100, True, False),  # both copied
        (LOG, -5000, -4900, False, True),  # rows later than their file
        (LOG, 90000, 9, False, True),  # the log of an earlier run, which nobody wrote to
        ('nothing of the kind\n', 8, 9, False, False),
        (LOG.replace('11-06', '13-06'), 8, 9, False, False),
        (None, 8, 9, False, False),
    ],
)
def test_utc(log: str | None, csv_written: float, log_written: float, known: bool, noted: bool, csv: Path) -> None:
    zero, note = zero_of(csv, log, csv_written, log_written)
    assert zero == (EPOCH if known else None)
    assert bool(note) == noted and (not noted or str(csv.with_suffix('.log')) in note)


def test_utc_in_picture_and_page(csv: Path) -> None:
    zero_of(csv, LOG, 8, 9)
    assert page_of(str(csv))['utc'] == (EPOCH + START) / MS
    picture = picture_of_file(csv)
    assert picture.panels[0].time.get_xlabel() == 'UTC, 2026-11-06'
    assert '21:23:22' in [label.get_text() for label in picture.panels[0].time.get_xticklabels()]


REPORT = {
    'started': '2026-11-06T21:23:15.000000Z',
    'ended': '2026-11-06T21:24:00.000000Z',
    'monotonic_zeros': [{'since': 0, 'utc': '2026-11-06T20:00:00.000000Z'}],
    'files': ['run 5.csv'],
}


@pytest.mark.parametrize(
    'changes, mappings, noted',
    [
        ({}, 1, False),
        ({'ended': None}, 1, False),
        ({'files': ['elf.csv']}, 1, False),  # both have been renamed
        ({'ended': '2026-11-06T21:23:20.000000Z'}, 0, True),  # of another run
        ({'started': '2026-11-06T21:24:20.000000Z', 'ended': None}, 0, True),
        ({'monotonic_zeros': []}, 0, True),  # as if there were none: the log's is of another run
        ({'monotonic_zeros': [{'utc': 'soon'}]}, 0, True),
        ({'files': 3}, 0, True),
    ],
)
def test_utc_by_the_report(changes: dict[str, Any], mappings: int, noted: bool, csv: Path) -> None:
    """Whenever the files were written, and whatever an old log says."""
    zero_of(csv, LOG.replace('20:00:00', '19:00:00'), 9000, -5000)
    os.utime(csv.with_suffix('.log'), (0, 0))
    csv.with_suffix('.json').write_text(json.dumps({**REPORT, **changes}))
    [source], notes = sources_of([str(csv)])
    assert [mapping.zero for mapping in source.files[0][1]] == [EPOCH] * mappings
    assert bool(notes) == noted


def test_clock_that_was_set(csv: Path) -> None:
    """Rows before and behind the step are where they belong, for those who look at the picture."""
    zeros = [
        {'since': since, 'utc': f'2026-11-06T{utc}Z'}
        for since, utc in ((0, '20:00:00'), (START + 5 * S, '20:10:00'), (START + 7 * S, '19:59:58'))
    ]
    csv.with_suffix('.json').write_text(json.dumps({**REPORT, 'ended': None, 'monotonic_zeros': zeros}))
    picture = picture_of([row(at, 1, 1) for at in range(10)], csv)
    [section] = picture.sections
    assert list(section.seconds(section.lines[0].points[0])) == [0, 1, 2, 3, 4, 5, 6, 7, 605, 606]
    assert picture.scale.utc == EPOCH + START


def test_rows_of_several_files(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All by the name of the first, in order; but none of another run, and none by the name of another one."""
    rows = [row(at / 10, 1 + at % 3, 1, dest=f'10.9.0.{at % 7}', app=f'app{at % 5}') for at in range(300)]
    names = [csv.name, *(f'run 5.{number}.csv' for number in (2, 3, 4, 5))]
    for name, first in zip(names, (0, 100, 200)):
        csv.with_name(name).write_text(text_of(rows[first : first + 100]))
    csv.with_name(names[3]).write_text(text_of([row(9000, 1, 1)]))
    csv.with_suffix('.json').write_text(json.dumps({**REPORT, 'files': names}))
    [source], notes = sources_of([str(csv)])
    assert [os.path.basename(part.path) for part, _ in source.files] == names[:3]
    assert len(notes) == 2 and names[3] in notes[0] and names[4] in notes[1]
    assert elfplot.main([str(csv)]) == 0
    assert ': 43 probes' in capfd.readouterr().out
    assert elfplot.main([str(csv.with_name(names[1]))]) == 0
    assert sum(map(int, re.findall(r': (\d+) probes', capfd.readouterr().out))) == 100


# What docs/columns.md says of other programs

COLUMNS_DOC = SCRIPT.with_name('docs') / 'columns.md'


def example(language: str) -> str:
    """The lines of the document that read the rows, and print percentiles."""
    found = re.findall(rf'^```{language}\n(.*?)^```', COLUMNS_DOC.read_text(), re.MULTILINE | re.DOTALL)
    return '\n'.join(found)


def odd_rows(csv: Path) -> Path:
    """Rows with whatever may be missing, and a program whose name looks so."""
    rows = [
        row(0.1 * i, 1, None if i % 4 == 0 else 2, app='NA', pid='', inipid=-1 if i % 4 == 0 else 7)
        for i in range(20)
    ]
    tcp = dict(srtt=900, cwnd=10, retrans=0, inflight=3)
    rows += [row(0.1 * i, 2, 3, app='a "b", c', **tcp, ifinfo='role=incoming', qttl=1) for i in range(20)]
    path = csv.with_name('elf.csv')
    text = text_of(rows).replace('a "b", c', '"a ""b"", c"')
    path.write_text(text)
    return path


def test_reading_with_pandas(csv: Path) -> None:
    pytest.importorskip('pandas')
    shown = subprocess.run(
        [sys.executable, '-c', example('python') + CHECK_PANDAS],
        cwd=odd_rows(csv).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    assert re.search(r'203.0.113.80 +1 +2\.0 +2\.0 +2\.0\n +2 +3\.0', shown.stdout)


CHECK_PANDAS = """
assert rows.latency.isna().sum() == rows.recvtime.isna().sum() == rows.inipid.isna().sum() == 5
assert rows.pid.isna().sum() == rows.srtt.isna().sum() == 20 and rows.retrans.sum() == 0
assert rows.inflight.sum() == 60 and rows.qttl.sum() == 20 and str(rows.qlen.dtype) == 'Int64'
assert rows.latency.sum() == 15 * 2000000 + 20 * 3000000 and str(rows.latency.dtype) == 'Int64'
assert list(rows.app.unique()) == ['NA', 'a "b", c']
"""


DUCKDB = """
import sys
sys.path.insert(0, sys.argv[1])
import duckdb
connection = duckdb.connect()
connection.execute(sys.argv[2])
print(connection.execute(sys.argv[3]).fetchall())
print(connection.execute('SELECT count(*) - count(latency), count(*) - count(recvtime), count(*) - count(pid), '
                         'sum(retrans), sum(latency) FROM rows').fetchall())
print(connection.execute('SELECT DISTINCT app FROM rows ORDER BY app').fetchall())
"""


def test_reading_with_duckdb(csv: Path) -> None:
    """Where there is one: ELFPROBE_TESTS_DUCKDB names the folder of its package. Debian has none."""
    load, query = re.findall(r'```sql\n(.*?)```', COLUMNS_DOC.read_text(), re.DOTALL)
    assert load.count('(') == load.count(')') and query.endswith(';\n')
    package = os.environ.get('ELFPROBE_TESTS_DUCKDB')
    if not package:
        return
    shown = subprocess.run(
        [sys.executable, '-c', DUCKDB, package, load, query],
        cwd=odd_rows(csv).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    table, sums, apps = shown.stdout.splitlines()
    assert "('203.0.113.80', 1, [2000000.0, 2000000.0, 2000000.0])" in table
    assert sums == f'[(5, 5, 20, 0, {15 * 2000000 + 20 * 3000000})]'
    assert apps == """[('NA',), ('a "b", c',)]"""


@pytest.mark.needs('Rscript')
def test_reading_with_r(csv: Path) -> None:
    shown = subprocess.run(
        ['Rscript', '--vanilla', '-e', example('r') + CHECK_R],
        cwd=odd_rows(csv).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    assert re.search(r'203.0.113.80 +1 +2 +2 +2\n2 203.0.113.80 +2 +3 +3', shown.stdout)


CHECK_R = """
stopifnot(sum(is.na(rows$latency)) == 5, sum(is.na(rows$recvtime)) == 5, sum(is.na(rows$inipid)) == 5)
stopifnot(sum(is.na(rows$pid)) == 20, sum(is.na(rows$srtt)) == 20, sum(rows$retrans, na.rm = TRUE) == 0)
stopifnot(sum(rows$latency, na.rm = TRUE) == 15 * 2e6 + 20 * 3e6)
stopifnot(identical(unique(rows$app), c("NA", "a \\"b\\", c")), rows$sendtime[1] == 5e12)
"""


# Destinations, and other keys


HEADINGS = {
    'dest': {'203.0.113.80': 80, '203.0.113.81': 80},
    'flow': {
        'TCP port 1000 to 203.0.113.80 port 443': 40,
        'TCP port 1001 to 203.0.113.80 port 443': 40,
        'UDP port 1000 to 203.0.113.81 port 443': 80,
    },
    'app': {'curl': 40, '(no name)': 40, 'a "b", c': 80},
    'responder': {'10.0.1.2': 70, '10.0.2.2': 80},  # those that answer nothing are nobody's
}


@pytest.mark.parametrize('by', HEADINGS)
def test_tables_by_another_key(by: str, csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each probe is in one table, whose figures are those of a file with its rows alone."""
    rows = []
    for number in range(40):
        for hop in 1, 2:
            ms = None if hop == 1 and number >= 30 and number % 2 else hop + number / 100
            to = dict(app='curl' if number % 2 else '', sport=1000 + number % 2)
            rows.append(row(number / 10, hop, ms, **to))
            ms = None if hop == 1 and number >= 30 and not number % 2 else hop
            to = dict(dest='203.0.113.81', app='"a ""b"", c"', protocol=17, sport=1000)
            rows.append(row(number / 10, hop, ms, **to))
    csv.write_text(text_of(rows))
    assert elfplot.main(['--by', by, str(csv)]) == 0
    out = capfd.readouterr().out
    assert {name: int(probes) for name, probes in re.findall(r'^(.+): (\d+) probes', out, re.M)} == HEADINGS[by]
    assert 'not drawn' not in out
    if by == 'flow':
        csv.write_text(text_of([row for row in rows if row['sport'] == 1001]))
        assert elfplot.main([str(csv)]) == 0
        alone = capfd.readouterr().out.split('\n\n')[0].splitlines()[1:]
        assert all(line in out.splitlines() for line in alone) and len(alone) == 4
        assert elfplot.main(['--by', by, '--dest', '203.0.113.80', str(csv)]) == 0
        assert capfd.readouterr().out.count(' probes, ') == 1


def many_destinations(count: int) -> list[dict[str, Any]]:
    return [
        row(0.1 * i, 1, 1, dest=f'10.9.0.{number}') for number in range(1, count + 1) for i in range(100 - number)
    ]


def test_busiest_destinations(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    csv.write_text(text_of(many_destinations(30)))
    data = page_of(str(csv))
    out = capfd.readouterr().out
    assert out.count('\nhop ') == 30
    assert '26 destinations with fewer probes: 10.9.0.5, 10.9.0.6, 10.9.0.7, 10.9.0.8 ...\n' in out
    assert [probes_in(section) for section in data['sections']] == list(range(99, 69, -1)) and not data['notes']


def test_chosen_destinations(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    csv.write_text(text_of(many_destinations(9) + [row(0, 1, 1, dest='2001:db8::1')]))
    data = page_of('--dest', '10.9.0.7', '--dest=2001:DB8:0::1', str(csv))
    out = capfd.readouterr().out
    assert re.findall(r'^(\S+): \d+ probes', out, re.M) == ['10.9.0.7', '2001:db8::1']
    assert [probes_in(section) for section in data['sections']] == [93, 1]
    assert elfplot.main(['--dest', '10.9.9.9', str(csv)]) == 1
    assert capfd.readouterr().err == (
        'elfplot.py: argument --dest: no probe went to 10.9.9.9, but to 10.9.0.1, 10.9.0.2, 10.9.0.3, '
        '10.9.0.4, 10.9.0.5 and 5 others\n'
    )


# All of it

EXTREMES = {
    'header only': [],
    'one row': [row(0, 1, 1)],
    'one row without answer': [row(0, 1, None)],
    'no answers': [dict(row, latency=-1, recvtime=-1, responder='') for row in regular()],
    'at once': [row(0, hop, hop) for hop in (1, 2, 3)],
    'latency of nothing': [row(0, 1, 0), row(1, 2, 0)],
    'sixteen hops': regular(16, 20),
    'thirty hops that lose': [
        row(0.1 * i, hop, None if (i + hop) % 5 == 0 else hop, srtt=900, retrans=i)
        for i in range(60)
        for hop in range(1, 31)
    ],
    'microseconds to seconds': [
        row(i / 10, hop, 0.005 * 20 ** (hop - 1)) for i in range(50) for hop in range(1, 6)
    ],
    'a day': regular(5, 100, 864),
    'a second': regular(5, 100, 0.01, srtt=40000, retrans=7),
    'nothing but IPv6': regular(
        12,
        30,
        dest='2001:db8:1111:2222:3333:4444:5555:6666',
        protocol=58,
        dport=0,
        responder='2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff',
    ),
    'many destinations': many_destinations(30),
    'hostile': regular(2, 30, app=HOSTILE, responder=HOSTILE) + regular(2, 30, dest=HOSTILE),
}


def overlaps(figure: Any) -> list[str]:
    """Texts that lie on one another, or not wholly in the picture."""
    FigureCanvasAgg(figure).draw()
    undrawn = set()  # labels of ticks beyond the ends of their axes
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        undrawn |= {
            label
            for tick in axis.get_major_ticks()
            for label in (tick.label1, tick.label2)
            if not axis.axes.axison or not low <= tick.get_loc() <= high
        }
    texts = figure.findobj(lambda artist: hasattr(artist, 'get_fontsize') and artist.get_visible())
    shown = [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_text().strip() and text not in undrawn
    ]
    width, height = figure.canvas.get_width_height()
    outside = [text for text, box in shown if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    return outside + [
        f'{a} / {b}'
        for i, (a, one) in enumerate(shown)
        for b, other in shown[:i]
        if one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1
    ]


@pytest.mark.parametrize('rows', EXTREMES.values(), ids=EXTREMES)
def test_extremes(rows: list[dict[str, Any]], csv: Path, recwarn: pytest.WarningsRecorder) -> None:
    csv.write_text(text_of(rows))
    assert sum(map(probes_in, page_of(str(csv))['sections'])) == len(rows)
    assert csv.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    assert not overlaps(picture_of(rows, csv).figure)
    assert not [str(warning.message) for warning in recwarn]


# Texts


@pytest.mark.parametrize(
    'ms, text',
    [(0.000001, '1 ns'), (0.0049, '4.9 µs'), (0.9994, '999 µs'), (0.9996, '1 ms'), (20, '20 ms'), (1500, '1.5 s')],
)
def test_latency_text(ms: float, text: str) -> None:
    assert elfplot.latency_text(ms) == text


def test_choose_of_nothing(csv: Path) -> None:
    with pytest.raises(Failure, match='nobody'):
        picture_of([], csv, '--dest', '10.0.0.1')


# Rows in bulk


def random_rows(seed: int) -> list[Record]:
    """Rows in the order of a CSV: flows, their ports used again, several responders, lost and late probes."""
    chance = random.Random(seed)
    dests = [f'10.9.0.{number}' for number in range(chance.choice([1, 3, 40]))]
    ports, hops, alternates = chance.choice([1, 3, 500]), chance.choice([3, 6]), chance.random() < 0.3
    slowness = chance.choice([1, 50])  # 50: answers overtake each other by up to 5 s
    retrans: Counter[tuple[str, int]] = Counter()
    found, now = [], START
    for number in range(1500):
        now += chance.choice([MS, 100 * MS, 4 * S]) if chance.random() < 0.02 else chance.randrange(20 * MS)
        flow = chance.choice(dests), chance.randrange(ports)
        hop = chance.randrange(1, hops)
        retrans[flow] = 0 if chance.random() < 0.003 else retrans[flow] + (chance.random() < 0.05)
        is_lost = chance.random() < 0.1 or (hop == 2 and now // (10 * S) % 3 == 0)
        is_tcp = chance.random() < 0.9
        changed = alternates or chance.random() < 0.01
        record = Record(
            dest=flow[0],
            sport=flow[1],
            dport=443,
            protocol=chance.choice([6, 6, 6, 17]),
            outttl=hop,
            sendtime=now,
            latency=-1 if is_lost else chance.randrange(1, 10 ** chance.randrange(4, 9)),
            responder='' if is_lost else f'10.0.{hop}.{chance.randrange(100) if changed else 1}',
            srtt=chance.choice([None, 900, 1000 + number]) if is_tcp else None,
            cwnd=10 if is_tcp else None,
            retrans=retrans[flow] if is_tcp else None,
            origseq=chance.choice([number, 7]),
            app=chance.choice(['a', '', 'b']),
        )
        found.append((now + (chance.randrange(3 * S) if is_lost else record.latency * slowness), record))
    return [record for _, record in sorted(found, key=lambda item: item[0])]


def what_is_known(summary: Summary) -> Any:
    """All that tables, findings and elf.json are made of, but for episodes: their slices end where batches do."""
    for _, destination in summary.destinations():
        destination.watch = Watch(Comparisons())

    def of(its: Any) -> Any:
        names = getattr(type(its), '__slots__', None) or vars(its)
        return {name.lstrip('_'): getattr(its, name) for name in names if name not in ('way', 'counted')}

    def hop(its: Any) -> Any:
        return {
            **of(its),
            'latency': its.latency.count and its.latency.stats(),
            'added': (its.added.count, its.added.count and its.added.median()),
            'who': list(its.responders.items()),
            'others': [(who, found.counts, found.total) for who, found in its.by_responder().items()],
        }

    destinations = [
        (dest, {number: hop(its) for number, its in found.hops.items()}, found.srtt.count and found.srtt.stats(),
         {name: value for name, value in vars(found).items() if name not in ('hops', 'srtt', 'watch')})
        for dest, found in summary.destinations()
    ]  # fmt: skip
    flows = [
        (key, {**of(flow), 'hops': {number: of(its) for number, its in flow.updated_hops().items()}})
        for its in summary.flows().values()
        for key, flow in its
    ]
    return summary.tables(), destinations, flows


@pytest.mark.parametrize(
    'limits',
    [(32768, 65536, 8192), (20, 1000, 1000), (1000, 60, 40), (300, 30, 10)],
    ids=['room', 'flows', 'hops of flows', 'hops'],
)
def test_summary_of_many_rows_at_once(limits: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same as of one row after the other, also where the oldest destinations and flows are forgotten."""
    for module in (summary_module, bulk):
        for name, limit in zip(('FLOWS_MAX', 'FLOW_HOPS_MAX', 'HOPS_MAX'), limits):
            monkeypatch.setattr(module, name, limit)
    for seed in range(3):
        monkeypatch.setattr(bulk, 'NEW_FLOWS_SHARE', (0.01, 10)[seed % 2])
        records = random_rows(seed)
        one_by_one, at_once = Summary(), bulk.BulkSummary()
        for record in records:
            one_by_one.note(record)
        texts = batches.Texts()
        for first in range(0, len(records), 500):
            its = records[first : first + 500]
            columns = {
                name: np.array([texts.number(value) if name in batches.TEXTS else batches.UNKNOWN if value is None
                                else value for value in (getattr(record, name) for record in its)])
                for name in batches.READ
            }  # fmt: skip
            batch = batches.Batch(texts.names, columns)
            assert list(batch.records()) == its
            at_once.note_all(batch)
        assert what_is_known(at_once) == what_is_known(one_by_one), seed


@pytest.mark.parametrize('seed', range(6))
def test_losses_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found, and what is usual, is the same as with one row after the other."""
    for module in losses, moments:
        monkeypatch.setattr(module, 'REFERENCE_MAX', 300)
    chance, texts = random.Random(seed), batches.Texts()
    every, usual = chance.choice([3, 20, 400]) * MS, chance.choice([0, 0.003])
    hops, batch_size = chance.choice([1, 4]), chance.choice([50, 2000])
    now, idents, columns = START, [0] * hops, {name: np.zeros(6000, int) for name in batches.READ}
    for place in range(6000):
        now += chance.choice([0, every, 2 * every, 30 * S if chance.random() < 0.002 else 0])
        hop = chance.randrange(hops)
        is_lost = chance.random() < (0.3 if place // 300 % 7 == 3 else usual) or place < seed % 3 * 250
        idents[hop] += chance.random() < 0.9 or not is_lost
        columns['sendtime'][place] = now - chance.choice([0, 0, 200 * MS])
        columns['outttl'][place], columns['latency'][place] = hop + 1, -1 if is_lost else MS
        columns['responder'][place] = texts.number(f'10.0.{hop}.{1 + (chance.random() < 0.001)}')
        columns['ripid'][place] = -1 if chance.random() < 0.001 else idents[hop] & 0xFFFF
    columns['responder'][columns['latency'] < 0] = 0
    found: list[Any] = []
    for kind in losses.Losses, moments.BulkLosses:
        tests = Comparisons()
        its, nodes = kind(tests), [types.SimpleNamespace(latency=LatencyHistogram()) for _ in range(hops)]
        for first in range(0, 6000, batch_size):
            which = slice(first, first + batch_size)
            batch = batches.Batch(texts.names, {name: each[which] for name, each in columns.items()})
            lost = batch['latency'] < 0
            answered, silent = (Groups(batch['outttl'], np.flatnonzero(each)) for each in (~lost, lost))
            if isinstance(its, moments.BulkLosses):
                at = [nodes[hop - 1] for hop in batch['outttl'][answered.firsts].tolist()]
                begun = moments.first_answers(answered, [its] * len(at))
                moments.note_moments(batch, answered, [its] * len(at), at)
                moments.note_silence(batch, silent, [its] * len(silent), begun)
            for record in batch.records():
                hop, moment = record.outttl, record.sendtime // losses.MOMENT
                latency = nodes[hop - 1].latency
                if kind is losses.Losses and record.responder:
                    its.note_moment(hop, latency, moment, latency.count, record.responder, record.ripid)
                elif kind is losses.Losses:
                    its.add_unanswered(hop, moment, 1)
                if record.responder:
                    latency.add(record.latency)
            newest = int(batch['sendtime'].max()) // losses.MOMENT
            its.note_retransmitted(newest, first % 3)
            its.close(newest - losses.LATE)
        its.end()
        states = {
            number: [getattr(state, name) for name in state.__slots__ if name != 'latency']
            for number, state in sorted(its._states.items())
        }
        found.append((its.episodes(), states, tests.count))
    assert found[0] == found[1]


def random_slices(seed: int, count: int) -> list[tuple[int, int, dict[int, float], float | None, int, int, None]]:
    """Slices of a way, as Snapshot has them: some without some hop, times in which a hop is slower, pauses."""
    chance = random.Random(seed)
    hops, noise, retrans, now = chance.choice([2, 7]), chance.choice([0.05, 2.0]), 0, START
    rare, late = chance.choice([1, 0.98, 0.7]), chance.randrange(1, hops + 1)
    slower: dict[int, tuple[int, float]] = {}
    found = []
    for number in range(count):
        now += chance.choice([50 * MS, 50 * MS, 90 * MS, 2 * S]) if chance.random() < 0.05 else 50 * MS
        if chance.random() < 0.02:
            slower[chance.randrange(hops + 1)] = number + chance.randrange(2, 60), chance.uniform(0, 20 * MS)
        latency, more = {}, 0.0
        for hop in [*range(1, hops + 1), TCP]:
            until, rise = slower.get(hop, (0, 0))
            more += rise * (number < until)
            if chance.random() < rare and (hop != late or number > count // 3):
                latency[hop] = float(hop * MS + more + chance.expovariate(1) * noise * MS)
        if set(latency) - {TCP}:
            retrans += chance.random() < 0.1
            window = chance.choice([None, chance.uniform(2, 90)])
            found.append(
                (now, now + 49 * MS, dict(sorted(latency.items())), window, retrans, chance.randrange(1, 9), None)
            )
    return found


@pytest.mark.parametrize('seed', range(8))
def test_slices_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is the same as in one slice after the other, to the last bit."""
    for module in episodes, slices:
        monkeypatch.setattr(module, 'LASTING', 20 * S)  # ns: some rises do
    rows, found = random_slices(seed, 1500), []
    for at_once in False, True:
        chance, tests, first = random.Random(seed), Comparisons(), 0
        way = Way({1: '10.0.1.2'}, tests)
        while first < len(rows):
            its = rows[first : first + (chance.randrange(1, 400) if at_once else 1)]
            first += len(its)
            if at_once:
                begins, ends, latencies, *others = zip(*its)
                keys = np.array([place << 8 | series for place, each in enumerate(latencies) for series in each])
                medians = np.array([value for each in latencies for value in each.values()])
                slices.Slices(way, begins, ends, keys, medians, *others).compare()
            else:
                way.add_slice(Snapshot(*its[0]))
        known = [(series, list(each.values), each.usual, each.threshold)
                 for each in (way.latencies, way.steps) for series, each in sorted(each.items())]  # fmt: skip
        found.append((way.all_episodes(), known, tests.count))
    assert found[0] == found[1]
    assert found[0][0]


def test_round_trips_of_tcp_beside_udp() -> None:
    """TCP's round trip is the same all the time. Answers of a flow without one, in between, do not change it."""
    count, responders = 400, {1: '10.0.1.2'}
    tcp, udp = (Flow('', None, '', 0) for _ in range(2))
    sent = [S + 5 * MS * number for number in range(count)]
    by_row, at_once = (Way(dict(responders), Comparisons()) for _ in range(2))
    known = {True: (tcp, 1500, 10, 0), False: (udp, None, None, None)}
    by_row.note([(at, 1, MS, '10.0.1.2', *known[number % 2 == 0]) for number, at in enumerate(sent)])
    columns = {
        name: np.array([value if number % 2 == 0 else -1 for number in range(count)])
        for name, value in (('srtt', 1500), ('cwnd', 10), ('retrans', 0))
    }
    rows = {
        'sendtime': np.array(sent), 'outttl': np.ones(count, int), 'latency': np.full(count, MS),
        'responder': np.zeros(count, int), **columns,
    }  # fmt: skip
    slices.note_slices(at_once, rows, np.arange(count) % 2, [tcp, udp])
    assert {each.updates for each in by_row.recent} == {each.updates for each in at_once.recent} == {1}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some KiB are read as those of some GiB: surveyed, and in parts, by several processes."""
    for name, value in (('PART', 8000), ('BLOCK', 1500), ('SURVEY_PIECE', 1000), ('SURVEY_PIECES', 4)):
        monkeypatch.setattr(batches, name, value)
    monkeypatch.setattr(batches, 'TEXTS_MAX', 40)
    monkeypatch.setattr(course, 'EXACT_MAX', 100)


def odd_line(number: int) -> dict[str, Any]:
    """Rows whose fields have many lengths, some quoted."""
    return row(
        number / 10,
        1 + number % 3,
        None if number % 11 == 0 else 10 ** (number % 7) / 1000,
        dest=f'2001:db8::{number % 50}',
        sport=number % 65536,
        app=('', '"a ""b"", c"', 'NA', 'é', 'of fifteen characters')[number % 5],
        ifinfo='"role=incoming;name=a,b"' if number % 4 else '',
        srtt=number if number % 3 else '',
        cwnd=10,
        retrans=number,
    )


@pytest.mark.usefixtures('small_parts')
@pytest.mark.parametrize('ends', ['\n', '\r\n'])
def test_large_files(ends: str, csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [odd_line(number) for number in range(450)]
    csv.write_bytes(text_of(rows).replace('\n', ends).encode())
    found = rows_of(csv)
    for name in 'sendtime', 'latency', 'dest', 'sport':
        assert [getattr(row, name) for row in found] == [row[name] for row in rows]
    assert [row.app for row in found] == [text_of_field(row['app']) for row in rows]
    assert [(row.srtt, row.retrans) for row in found] == [(row['srtt'] or None, row['retrans']) for row in rows]
    if ends != '\n':
        return
    assert elfplot.main(['--cdf', '--hop', '1', str(csv)]) == 0
    assert capfd.readouterr().out.count(': 9 probes') == 50
    csv.write_text(text_of([*rows, row(0, 1, 1, outttl=256), *rows]))
    assert elfplot.main([str(csv)]) == 1
    assert 'outttl is 256 in line 452\n' in capfd.readouterr().err


@pytest.mark.usefixtures('small_parts')
def test_figures_of_many_rows(csv: Path) -> None:
    """They are exact to 1 %, whatever the rows; what is counted is exact."""
    chance = random.Random(5)
    rows = [
        row(number / 100, 1, chance.expovariate(0.1) + 0.0005, app='x' * (number % 16)) for number in range(3000)
    ]
    [section] = picture_of(rows, csv).sections
    [line] = section.lines
    latencies = np.array([row['latency'] for row in rows])
    assert line.spread == pytest.approx(list(np.quantile(latencies, course.QUANTILES)), rel=0.01)
    assert (section.slowest, section.fastest) == pytest.approx(
        (latencies.max() / MS, latencies.min() / MS), rel=0.01
    )
    assert section.probes.sum() == line.bins.count.sum() == 3000
    in_bin = np.array([row['sendtime'] - START for row in rows]) // section.width
    for number, low, median, high, most in zip(
        line.bins.number, line.bins.low, line.bins.median, line.bins.high, line.bins.max
    ):
        its = latencies[in_bin == number]
        assert (low, median, high) == pytest.approx(tuple(np.quantile(its, (0.25, 0.5, 0.75))), rel=0.01)
        assert most == its.max()


def test_memory_does_not_grow_with_the_rows(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as many rows need as much, but for what waits. Of two destinations, one with less detail."""
    for module, name, value in (
        (batches, 'PART', 1 << 16), (batches, 'BLOCK', 1 << 14), (batches, 'SURVEY_PIECE', 1 << 11),
        (course, 'EXACT_MAX', 2000), (course, 'SMALL_EXACT_MAX', 1000), (course, 'WAITING_MIN', 500),
        (course, 'CELLS_MAX', 4000), (course, 'SMALL_CELLS_MAX', 2000),
        (course, 'POINTS_MAX', 100), (sources, 'LARGE_MAX', 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    chance, peaks = random.Random(3), []
    for count in 6_000, 60_000:
        with open(csv, 'w') as file:
            file.write(','.join(COLUMNS[:15]) + '\n')
            for number in range(count):
                sent, hop, latency = START + number * 3 * MS, number % 3 + 1, chance.randrange(MS, 2 * MS)
                dest = f'203.0.113.{80 + number % 2}'
                file.write(f'0,7,{number},{latency},{sent},0,{dest},10.0.{hop}.2,{hop},64,40112,443,17,1,1\n')
        tracemalloc.start()
        for source in sources_of([str(csv)])[0]:
            found = sources.read(source, False, sources.Window(0, sources.FOREVER, []), 2)
            assert sum(each.probes for each in found.courses.values()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_destinations_share_memory(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many, each has less detail. What is counted is exact, and percentiles are within 1 %."""
    for module, name, value in (
        (course, 'EXACT_MAX', 400), (course, 'CELLS_MAX', 400), (course, 'WAITING_MIN', 100),
        (sources, 'FULL_MAX', 2), (batches, 'SURVEY_PIECE', 1 << 20),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    chance = random.Random(4)
    rows = [
        row(number / 100, 1, chance.uniform(1, 1.1), dest=f'203.0.113.{number % 8}') for number in range(8 * 500)
    ]
    csv.write_text(text_of(rows))
    [source] = sources_of([str(csv)])[0]
    found = sources.read(source, False, sources.Window(0, sources.FOREVER, []), 8).courses
    assert len(found) == 8 and sum(len(each._cells) for each in found.values()) <= 2 * 400
    for dest, each in found.items():
        [line] = each.lines()
        latencies = [its['latency'] for its in rows if its['dest'] == dest]
        assert line.bins.count.sum() == len(latencies) == 500
        assert line.spread == pytest.approx(list(np.quantile(latencies, course.QUANTILES)), rel=0.01)


@pytest.mark.parametrize('lines', [5, 200])
def test_responders_that_share_a_line_share_its_points(lines: int) -> None:
    """The points are a sample of the answers of all of them, also where many lines have fewer points each."""
    chance, its, texts = random.Random(5), course.Course('10.0.0.1', 0, 10 * S), batches.Texts()
    responders = [texts.number(f'10.0.0.{number}') for number in range(1, 7)]
    weights = [9, 9, 9, 8, 2, 2]
    which = np.array(chance.choices(responders, weights, k=60_000))
    hops = np.ones(len(which), np.int64)
    hops[: max(lines - 6, 0)] = range(2, lines - 4)
    columns = {name: np.ones(len(which), np.int64) for name in batches.READ}
    columns.update(responder=which, latency=(which + 1) * MS, dest=np.full(len(which), responders[0]), outttl=hops)
    its.add(batches.Batch(texts.names, columns), np.arange(len(which)) * 10 * S // len(which))
    [last] = (line for line in its.lines() if line.responder == '3 others')
    counts = np.unique(last.points[1], return_counts=True)[1]
    assert len(counts) == 3 and 0.55 < counts[0] / counts.sum() < 0.78, counts


def test_bins_that_become_too_many() -> None:
    """Rows long before and behind those that the survey saw: bins become wider, nothing is lost."""
    its = course.Course('10.0.0.1', 0, 1000)
    texts = batches.Texts()
    texts.number('10.0.0.1')
    for second in (0, -7, 9000, 20):
        columns = {name: np.zeros(1, np.int64) for name in batches.READ}
        its.add(batches.Batch(texts.names, columns), np.array([second * S]))
    first, probes, unanswered, _ = its.by_bin()
    assert (probes.sum(), unanswered.sum()) == (4, 0) and probes.shape[1] <= course.BINS
    [line] = its.lines()
    assert list(line.bins.t) == [second * S for second in (-7, 0, 20, 9000)]
    assert first == line.bins.number[0] == -7 * S // its.width


def test_cells_that_become_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins become wider, until there are few of them. Latencies stay exact to 1 %."""
    monkeypatch.setattr(course, 'SMALL_EXACT_MAX', 300)
    monkeypatch.setattr(course, 'SMALL_CELLS_MAX', 500)
    monkeypatch.setattr(course, 'WAITING_MIN', 100)
    its, texts, chance = course.Course('10.0.0.1', 0, S, is_small=True), batches.Texts(), random.Random(4)
    latencies = []
    for start in range(0, 2000, 100):
        columns = {name: np.ones(100, np.int64) for name in batches.READ}
        latencies += [chance.randrange(MS, 2 * MS) for _ in range(100)]
        columns['latency'] = np.array(latencies[-100:])
        for name in 'dest', 'responder':
            columns[name][:] = texts.number('10.0.0.1')
        for name in 'srtt', 'retrans':
            columns[name][:] = batches.UNKNOWN
        its.add(batches.Batch(texts.names, columns), np.arange(start, start + 100) * S)
    [line] = its.lines()
    assert its.width > S and len(its._cells) < 1000 and len(line.bins) >= course.FEW_BINS // 2
    assert line.bins.count.sum() == 2000
    assert line.spread == pytest.approx(list(np.quantile(latencies, course.QUANTILES)), rel=0.01)


@pytest.mark.parametrize(
    'text, retrans',
    [
        ('7.0', 7),  # as pandas writes what it has read
        ('+7', 7),
        (' 7', 7),
    ],
)
def test_numbers_of_other_programs(text: str, retrans: int, csv: Path) -> None:
    csv.write_text(text_of([row(0, 1, 1, retrans=text), row(1, 1, 1)]) + '\n')
    assert [row.retrans for row in rows_of(csv)] == [retrans, None]


# Which rows


def probes_at(csv: Path, *options: str) -> list[float]:
    """The times of the probes that are drawn, s since the first one of the run."""
    sections = picture_of_file(csv, *options).sections
    return sorted((section.course.start + at - START) / S for section in sections for line in section.lines
                  for at in line.points[0])  # fmt: skip


def test_part_of_the_time(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    csv.write_text(text_of([row(at, 1, 1) for at in range(10)]))
    ran = picture_of_file(csv, '--from', '2', '--to', '4').sections
    assert [section.course.probes for section in ran] == [3]
    assert elfplot.main(['--last', '2.5', str(csv)]) == 0
    assert ': 3 probes' in capfd.readouterr().out
    assert elfplot.main(['--from', '2026-11-06T21:23:25', str(csv)]) == 1
    assert 'argument --from' in capfd.readouterr().err
    csv.with_suffix('.json').write_text(json.dumps(REPORT))
    for begin, end in (('2026-11-06T21:23:22Z', '2026-11-06T22:23:24+01:00'), ('2', '2026-11-06 21:23:24')):
        assert elfplot.main(['--from', begin, '--to', end, str(csv)]) == 0
        assert ': 3 probes' in capfd.readouterr().out
    assert elfplot.main(['--from', '100', str(csv)]) == 0
    assert 'no probes in this time' in capfd.readouterr().out


def test_several_hosts(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each has its own path to a destination, and its own clock."""
    paths = [csv.with_name(f'{host}.csv') for host in ('a', 'b')]
    for path, hops, later in zip(paths, (2, 3), (0, 4 * S)):
        path.write_text(text_of(regular(hops)))
        zero = f'2026-11-06T20:00:0{later // S}.000000Z'
        report = {**REPORT, 'host': path.stem, 'files': [path.name], 'monotonic_zeros': [{'since': 0, 'utc': zero}]}
        path.with_suffix('.json').write_text(json.dumps(report))
    assert elfplot.main([*map(str, paths), '--html']) == 0
    out = capfd.readouterr().out
    assert re.findall(r'^from (\S):\n\S+ (\d+) probes', out, re.M) == [('a', '100'), ('b', '150')]
    sections = data_of(paths[0].with_suffix('.html').read_text())['sections']
    assert sorted((len(section['hops']), round(section['start'], 3)) for section in sections) == [(2, 0), (3, 4)]


@pytest.mark.parametrize('hours, boots', [((0, 0), 1), ((0, 1), 2), ((1, 1), 2)])
def test_boots_by_their_times(hours: tuple[int, int], boots: int, csv: Path) -> None:
    """The rows of two files are inside the first one's by CLOCK_MONOTONIC, and by UTC inside, too, or later."""
    rows, paths = regular(2, 60), [csv.with_name(f'{name}.csv') for name in 'abc']
    for path, its, hour in zip(paths, (rows, rows[10:20], rows[50:70]), (20, *(20 + each for each in hours))):
        path.write_text(text_of(its))
        report = {
            **REPORT, 'host': 'here', 'files': [path.name], 'ended': None,
            'monotonic_zeros': [{'since': 0, 'utc': f'2026-11-06T{hour}:00:00.000000Z'}],
        }  # fmt: skip
        path.with_suffix('.json').write_text(json.dumps(report))
    found, notes = sources_of([*map(str, paths)])
    assert (len(found), notes) == (boots, [])
    times = [each.times(mappings, file.span[0], True) for each in found for file, mappings in each.files]
    assert times[2] - times[0] == rows[50]['sendtime'] - rows[0]['sendtime'] + hours[1] * 3600 * S


def test_clock_set_back_within_a_run(csv: Path) -> None:
    """Files of one run are of one boot, whatever UTC says."""
    rows, second = regular(2, 60), csv.with_name('second.csv')
    csv.write_text(text_of(rows[:70]))
    second.write_text(text_of(rows[60:]))
    zeros = [(0, 21), (rows[65]['sendtime'], 20)]
    report = {
        **REPORT, 'ended': None, 'started': '2026-11-06T20:00:00.000000Z', 'files': [csv.name, second.name],
        'monotonic_zeros': [{'since': at, 'utc': f'2026-11-06T{hour}:00:00.000000Z'} for at, hour in zeros],
    }  # fmt: skip
    csv.with_suffix('.json').write_text(json.dumps(report))
    [found], notes = sources_of([str(csv)])
    assert (len(found.files), notes) == (2, [])


def test_files_of_one_run_by_their_names(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without elf.json, in any order, and none twice."""
    rows = regular(2, 60)
    second = csv.with_name('second.csv')
    csv.write_text(text_of(rows[:70]))
    second.write_text(text_of(rows[70:]))
    assert elfplot.main(['-o', str(csv.with_name('x')), str(second), str(csv), str(second)]) == 0
    out = capfd.readouterr().out
    summary = Summary()
    for one in rows:
        summary.note(Record(*(one[name] for name in Record._fields[:8])))
    assert out.split('\n')[:-3] == summary.tables()[1:]


# Pictures for papers


@pytest.mark.parametrize('kind, begins', [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_formats(kind: str, begins: bytes, csv: Path) -> None:
    csv.write_text(text_of(regular(2, 5)))
    assert elfplot.main(['--format', kind, '--cdf', str(csv)]) == 0
    assert csv.with_suffix('.' + kind).read_bytes().startswith(begins)
    assert {path.suffix for path in csv.parent.iterdir()} == {'.csv', '.' + kind}


def test_distribution_by_hop(csv: Path) -> None:
    options = '--cdf', '--hop', '2', '--hop', '3', '--xlim', '1.5:3.5', '--ylim', '0.5:1'
    picture = picture_of(regular(hops=4, probes=50), csv, *options)
    [axes] = picture.figure.axes
    drawn = lines_of(axes)
    assert list(drawn) == ['hop 2', 'hop 3'] and not overlaps(picture.figure)
    assert (axes.get_xlim(), axes.get_ylim()) == ((1.5, 3.5), (0.5, 1))
    for hop, line in zip((2, 3), drawn.values()):
        assert list(line.get_xdata()) == pytest.approx([hop, *(hop + i / 100 for i in range(50))])
        assert list(line.get_ydata()) == pytest.approx([i / 50 for i in range(51)])


def test_hop_that_nobody_probed(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    csv.write_text(text_of(regular(hops=4)))
    for options in ['--hop', '9'], ['--cdf', '--hop', '9']:
        assert elfplot.main([*options, str(csv)]) == 1
        told = capfd.readouterr()
        assert told.out == ''
        assert told.err == 'elfplot.py: argument --hop: no probe went to hop 9, but to 1, 2, 3, 4\n'
    picture_of(regular(hops=4), csv, '--hop', '9', '--hop', '2')


def test_hops_and_limits_of_the_picture(csv: Path) -> None:
    picture = picture_of([*regular(hops=4), row(1, 4, None)], csv, '--hop', '2', '--hop', '4', '--ylim', '1:6')
    assert list(lines_of(picture.panels[0].time)) == ['2 10.0.2.2', '4 10.0.4.2']
    assert picture.panels[0].time.get_ylim() == picture.panels[0].hops.get_ylim() == (1, 6)
    assert [label.get_text() for label in picture.panels[0].lost.get_yticklabels()] == ['4']


# Two runs


def noise(seed: int, count: int, slowness: float = 0.9) -> list[float]:
    """Latencies of a queue, in ms: each depends on the one before."""
    chance, value, found = random.Random(seed), 0.0, []
    for _ in range(count):
        value = slowness * value + chance.gauss(0, 1)
        found.append(value)
    return found


def run_of(seed: int, shift: float = 0.0, lost: float = 0.0, **changes: Any) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for hop in (1, 2, 3):
        for i, value in enumerate(noise(seed + 100 * hop, 1500)):
            more = shift if hop >= 2 else 0
            its = changes if hop == 2 else {}
            is_lost = hop == 3 and chance.random() < lost
            rows.append(row(i / 50 + hop / 1000, hop, None if is_lost else 20 + 5 * hop + value / 5 + more, **its))
    return sorted(rows, key=lambda row: row['sendtime'])


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]], csv: Path) -> dict[int, str]:
    """What the table says of each hop, of two runs with these rows."""
    paths = [csv.with_name(name) for name in ('before.csv', 'after.csv')]
    for path, rows in zip(paths, (before, after)):
        path.write_text(text_of(rows))
    args = elfplot.parse_arguments(['--compare', *map(str, paths)])
    results, _, _ = elfplot.read_all(args)
    lines = elfplot.comparison(*results).lines()
    return {int(line.split()[0]): line for line in lines if re.match(r' *\d+ ', line)}


def test_what_changed(csv: Path) -> None:
    said = compared(run_of(1), run_of(2, shift=1, lost=0.2, responder='10.0.99.2'), csv)
    assert list(said) == [1, 2, 3]
    assert not re.search('slower|faster|answers|router', said[1])
    assert said[2].endswith('other router: 10.0.99.2, was 10.0.2.2; slower') and '<0.001' in said[2]
    assert said[3].endswith('slower; fewer answers') and said[3].count('<0.001') == 2
    before, after, change = map(float, said[2].split()[1:4])
    assert change == pytest.approx(after - before, abs=0.002) == pytest.approx(1, abs=0.3)


def test_runs_of_which_one_is_rounded(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding makes no change that there is not."""
    monkeypatch.setattr(course, 'EXACT_MAX', 500)
    chance = random.Random(3)
    runs = [[row(i / 100, 1, 2.205 + chance.gauss(0, 0.04)) for i in range(probes)] for probes in (300, 6000)]
    [said] = compared(*runs, csv).values()  # the median is near to the end of a step of 2 %
    assert not re.search('slower|faster', said)


def test_runs_that_do_not_differ() -> None:
    """Also where latencies depend on those before: of runs alike, few differ, as p says."""
    found = []
    for seed in range(100):
        slow = noise(seed, 2000, 0.99)
        slices = [statistics.median(slow[i : i + 25]) for i in range(0, 2000, 25)]
        found.append(compare.rank_sum(np.array(slices[:40]), np.array(slices[40:])))
    assert sum(p is not None and p < 0.05 for p in found) <= 0.1 * len(found)
    same = np.arange(20.0)
    assert compare.rank_sum(same, same) == 1 and compare.rank_sum(same[:7], same) is None
    shifted = compare.rank_sum(same % 5, same % 5 + 10)
    assert shifted is not None and shifted < 1e-4
    assert compare.holm([0.01, 0.9, 0.02, 0.03]) == pytest.approx([0.04, 0.9, 0.06, 0.06])


def test_comparison_in_the_picture(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    after = csv.with_name('after.csv')
    csv.write_text(text_of(regular(2)))
    after.write_text(text_of(regular(3)))
    assert elfplot.main(['--compare', '--html', str(csv), str(after)]) == 0
    out = capfd.readouterr().out
    assert '203.0.113.80: run 5.csv and after.csv' in out and 'only probed after' in out and 'Holm' in out
    data = data_of(csv.with_suffix('.html').read_text())
    assert [len(section['hops']) for section in data['sections']] == [2, 3] and 'Holm' in data['notes'][-1]
    [changed] = data['compared']
    assert [cells[0] for cells in changed['rows']] == ['1', '2', '3']
    assert changed['rows'][2][-1] == 'only probed after' and len(changed['head']) == len(changed['rows'][0])


def test_comparison_of_many_destinations(csv: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """None is left out silently."""
    after = csv.with_name('after.csv')
    for path in csv, after:
        path.write_text(text_of(many_destinations(30)))
    assert elfplot.main(['--compare', str(csv), str(after)]) == 0
    assert capfd.readouterr().out.count(': run 5.csv and after.csv') == 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elfplot, 'PAGE_MAX', 4)
        assert elfplot.main(['--compare', str(csv), str(after)]) == 0
    out = capfd.readouterr().out
    assert out.count(': run 5.csv and after.csv') == 16
    assert '(--dest compares them): 14 destinations with fewer probes: 10.9.0.17, 10.9.0.18,' in out


@pytest.mark.usefixtures('small_parts')
def test_progress_on_a_terminal(
    csv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told there only, and nothing of it stays."""
    csv.write_text(text_of(regular()))
    monkeypatch.setattr(elfplot, 'PROGRESS_FROM', 0)
    args = elfplot.parse_arguments([str(csv)])
    elfplot.read_all(args)
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    elfplot.read_all(args)
    assert re.fullmatch(r'(\rreading: +\d+%)+\r\x1b\[K', capsys.readouterr().err)
