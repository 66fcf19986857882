"""A browser without a window, for tests of pages.

It speaks the DevTools protocol over a pair of pipes, so no other package is needed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

PROGRAM = 'chromium-headless-shell'
PATIENCE = 60  # s, for an answer
KEYS = {'Tab': 9, 'Escape': 27, 'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39, 'ArrowDown': 40, 'Enter': 13}


class Browser:
    """A context: one page at a time. `problems` are what its console and its network showed."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._session: str | None = None
        self._number, self._read = 0, b''

    def __enter__(self) -> Browser:
        self._folder = tempfile.mkdtemp()
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # It reads descriptor 3 and writes to descriptor 4. As root it has no sandbox.
        start = f'exec {PROGRAM} "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-'
        options = ['--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', f'--user-data-dir={self._folder}']
        self._process = subprocess.Popen(
            ['bash', '-c', start, 'bash', *options],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, 'HOME': self._folder},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.ask('Target.createTarget', url='about:blank')['targetId']
        self._session = self.ask('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in 'Page', 'Runtime', 'Log', 'Network':
            self.ask(f'{domain}.enable')
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        try:
            self.ask('Browser.close')
            self._process.wait(PATIENCE)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, method: str, **params: Any) -> Any:
        """Send a command, and return its result."""
        self._number += 1
        command = {'id': self._number, 'method': method, 'params': params}
        if self._session:
            command['sessionId'] = self._session
        os.write(self._to, json.dumps(command).encode() + b'\0')
        while True:
            got = self._next()
            if got.get('id') == self._number:
                assert 'error' not in got, (method, got['error'])
                return got['result']
            self._note(got.get('method', ''), got.get('params', {}))

    def _next(self) -> Any:
        until = time.monotonic() + PATIENCE
        while b'\0' not in self._read:
            assert select.select([self._from], [], [], max(until - time.monotonic(), 0))[0], 'no answer'
            more = os.read(self._from, 1 << 20)
            assert more, 'the browser ended'
            self._read += more
        message, _, self._read = self._read.partition(b'\0')
        return json.loads(message)

    def _note(self, method: str, params: Any) -> None:
        url = params.get('request', {}).get('url', 'file:')
        if method in ('Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Log.entryAdded'):
            self.problems.append(json.dumps(params)[:500])
        elif method == 'Network.requestWillBeSent' and not url.startswith('file:'):
            self.problems.append(f'asks for {url}')

    def open(self, url: str, width: int) -> None:
        """Load a page in a viewport of this width."""
        self.problems.clear()
        self.ask(
            'Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.ask('Page.navigate', url=url)
        until = time.monotonic() + PATIENCE
        while not self.run(f'location.href === {json.dumps(url)} && document.readyState === "complete"'):
            assert time.monotonic() < until, 'the page does not load'

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        answer = self.ask('Runtime.evaluate', expression=script, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def mouse(self, kind: str, x: float, y: float, pressed: bool = False) -> None:
        """kind: Moved, Pressed, Released."""
        button = 'none' if kind == 'Moved' and not pressed else 'left'
        self.ask('Input.dispatchMouseEvent', type=f'mouse{kind}', x=x, y=y, button=button, clickCount=1,
                 buttons=int(pressed))  # fmt: skip

    def place(self, element: str) -> tuple[float, float, float, float]:
        """Return left, top, width and height of an element (an expression of JavaScript), once it is in view."""
        box = 'element.scrollIntoView({block: "center"}); return element.getBoundingClientRect().toJSON()'
        found = self.run(f'(element => {{ {box} }})({element})')
        return found['x'], found['y'], found['width'], found['height']

    def click(self, element: str) -> None:
        left, top, width, height = self.place(element)
        x, y = left + width / 2, top + height / 2
        self.mouse('Moved', x, y)
        self.mouse('Pressed', x, y, pressed=True)
        self.mouse('Released', x, y)

    def key(self, key: str) -> None:
        text = {'text': key} if len(key) == 1 else {}
        code = KEYS.get(key, ord(key[0]))
        self.ask('Input.dispatchKeyEvent', type='keyDown', key=key, windowsVirtualKeyCode=code, **text)
        self.ask('Input.dispatchKeyEvent', type='keyUp', key=key, windowsVirtualKeyCode=code)
