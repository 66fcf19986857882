# SPDX-License-Identifier: GPL-3.0-only
"""What elfprobe.py and elfplot.py know of results: rows, summary, findings, console.

Nothing here imports elfprobe.py or bcc, and nothing needs root. An arrow means "imports":

    summary -> findings -> paths -> histogram
    rows -> addresses -> usage <- console
    extensions
"""
